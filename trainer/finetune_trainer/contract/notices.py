"""What a training says about itself: each notice is an Event and a line in status."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field

from finetune_trainer.contract.base import Base
from finetune_trainer.contract.redaction import redact


class NoticeCode(StrEnum):
    """What the training noticed about itself, or did about it."""

    LOSS_RISING = "LossRising"
    LOSS_FLAT = "LossFlat"
    OVERFITTING = "Overfitting"
    LOSS_NOT_FINITE = "LossNotFinite"
    DEAD_GRADIENT = "DeadGradient"
    ANSWERS_UNRELATED = "AnswersUnrelated"

    MEMORY_FREED = "MemoryFreed"
    BATCH_HALVED = "BatchHalved"
    GRADIENT_CHECKPOINTING_ENABLED = "GradientCheckpointingEnabled"
    SEQUENCE_SHORTENED = "SequenceShortened"

    ENGINE_FALLBACK = "EngineFallback"
    EARLY_STOPPED = "EarlyStopped"
    RESUMED = "Resumed"


NEWS = {NoticeCode.EARLY_STOPPED, NoticeCode.RESUMED}
"""What went as it should."""


class Notice(Base):
    """One thing that the training noticed or did: an Event and a line in status."""

    code: Annotated[str, Field(pattern=r"^[A-Z][A-Za-z0-9]*$", max_length=64)]
    """What it is, in CamelCase: LossRising, BatchHalved, Resumed … (docs/training.md); a newer
    trainer may know others."""

    step: int | None = None
    """The optimizer step at which it showed."""

    evidence: Annotated[str, Field(max_length=300)]
    """The figures that it rests on."""

    remedy: Annotated[str, Field(max_length=300)]
    """What to do, or what was done."""

    def redacted(self) -> Self:
        """The same without credentials."""
        said = {"evidence": redact(self.evidence), "remedy": redact(self.remedy)}
        return self.model_copy(update=said)

    @property
    def warning(self) -> bool:
        """Whether somebody should look at it, as at whatever is not known here."""
        return self.code not in NEWS

    @property
    def text(self) -> str:
        """One line for the log and the Event: where, the figures, and what to do."""
        where = "" if self.step is None else f"step {self.step}: "
        return f"{where}{self.evidence.rstrip('. ')}. {self.remedy}"
