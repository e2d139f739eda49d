"""What a stage tells of itself: status.progress while it runs, its notices, and metrics.json,
which a training leaves beside its adapter, for the export and for people.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from finetune_trainer.contract.base import GROUP, PLURAL, VERSION, Base, Stage, redact
from finetune_trainer.contract.run import JobReference


class NoticeCode(StrEnum):
    """What the training noticed about itself, or did about it; and what an export's pod lacks."""

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

    BEYOND_CONTEXT = "BeyondContext"
    ENGINE_FALLBACK = "EngineFallback"
    MODEL_READ_AGAIN = "ModelReadAgain"
    GPU_UNUSED = "GpuUnused"

    EARLY_STOPPED = "EarlyStopped"
    RESUMED = "Resumed"


NEWS = {
    NoticeCode.EARLY_STOPPED,
    NoticeCode.RESUMED,
    NoticeCode.MODEL_READ_AGAIN,
    NoticeCode.GPU_UNUSED,
}
"""What is no fault of the training: it went as it should, or is about the export's time."""


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


def status_path(job: JobReference) -> str:
    """The API server's path of the FineTuneJob's status subresource."""
    return f"/apis/{GROUP}/{VERSION}/namespaces/{job.namespace}/{PLURAL}/{job.name}/status"


class Progress(Base):
    """How far the running stage is. Written by the trainer itself, at most every 10 seconds."""

    stage: Stage | None = None
    """The stage that reports."""

    job: str | None = None
    """The Job (batch/v1) whose pod reports."""

    step: int | None = None
    """Steps done."""

    total_steps: int | None = None
    """Steps in all."""

    percent: str | None = None
    """Share done, e.g. 35%."""

    epoch: float | None = None
    """Passes over the data so far."""

    loss: float | None = None
    """Training loss at the last logging step."""

    eval_loss: float | None = None
    """Loss on the held-out rows at the last evaluation."""

    reward_accuracy: float | None = None
    """Of preferences: share of the held-out rows that are judged right, at the last evaluation."""

    reward_margin: float | None = None
    """Of preferences: mean reward of good answers less that of the others, in the same place."""

    learning_rate: float | None = None
    """Learning rate at the last logging step."""

    tokens_per_second: float | None = None
    """Tokens trained on per second, padding not counted."""

    eta: str | None = None
    """Time left in this stage, e.g. 4m10s."""

    message: str | None = None
    """What is being done."""

    notices: tuple[Notice, ...] = ()
    """The last 20 things that the running training noticed or did. The operator copies them to
    status.notices and makes Events of them."""

    heartbeat_seconds: int | None = None
    """This is renewed once in so many seconds at least, as long as the trainer lives."""

    last_update_time: str | None = None
    """When this was written (RFC 3339)."""

    def updated(self, newer: Progress) -> Self:
        """With the fields that `newer` sets, None included."""
        return self.model_copy(update={n: getattr(newer, n) for n in newer.model_fields_set})

    def merge_patch(self) -> dict[str, Any]:
        """A merge patch with the fields that are set here: null clears one, others stay."""
        patch = self.model_dump(mode="json", exclude_unset=True)
        # A merge patch replaces lists as a whole, and nulls in one would stay.
        if "notices" in patch:
            notices = [each.model_dump(mode="json", exclude_none=True) for each in self.notices]
            patch["notices"] = notices or None
        return patch


class TrainingMetrics(Base):
    """The figures of a training, in status and manifest by these names in camelCase.

    Losses are means in nats per answer token. A figure that was not measured is absent.
    """

    model_config = ConfigDict(extra="ignore")

    train_loss: float | None = None
    """Mean over all steps."""

    final_loss: float | None = None
    """At the last logging step."""

    train_runtime_seconds: float | None = None
    train_steps: float | None = None
    train_tokens: float | None = None
    tokens_per_second: float | None = None
    """Trained on, evaluations and padding not counted."""

    base_eval_loss: float | None = None
    base_perplexity: float | None = None
    """Of the base model on the held-out rows."""

    eval_loss: float | None = None
    perplexity: float | None = None
    """Of the tuned model on the held-out rows."""

    eval_tokens: float | None = None

    base_reward_accuracy: float | None = None
    reward_accuracy: float | None = None
    """Of base and tuned model. With dpo and orpo, the share of held-out pairs whose chosen answer
    has the higher reward; with kto, the share of held-out rows whose reward is on the side of its
    label. With dpo and kto the base's rewards are 0, so that it has no row right."""

    base_reward_margin: float | None = None
    reward_margin: float | None = None
    """Mean reward of the held-out rows' chosen (or desirable) answers less that of the others."""

    best_step: float | None = None
    """The step whose adapter was kept, with earlyStopping."""

    peak_memory_bytes: float | None = None
    """What one device's training held at most: on a GPU of torch's allocator (reserved), on a CPU
    the process's resident memory. Of the last process, where the training was resumed."""

    peak_allocated_bytes: float | None = None
    """What of it was in use at most, on a GPU."""

    predicted_memory_bytes: float | None = None
    """What the plan expected on one device; on a GPU also what the driver takes for itself."""

    trainable_parameters: float | None = None
    base_parameters: float | None = None

    def named(self) -> dict[str, float]:
        """What is known, by the names in status."""
        return self.model_dump(exclude_none=True)

    def rounded(self) -> TrainingMetrics:
        """The same with six digits behind the point."""
        return TrainingMetrics(**{name: round(value, 6) for name, value in self.named().items()})


class LogEntry(BaseModel):
    """What the Trainer logged at a step, by its own names."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    step: int
    epoch: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    eval_loss: float | None = None
    reward_accuracy: float | None = None
    reward_margin: float | None = None
    """Of preferences: see TrainingMetrics."""


class TrainingRecord(Base):
    """The whole of metrics.json. An export may read one that another version wrote."""

    model_config = ConfigDict(extra="ignore")

    metrics: TrainingMetrics
    hyperparameters: dict[str, JsonValue]
    """spec.training as it was applied, e.g. with the epochs that `auto` stood for."""

    notices: tuple[Notice, ...] = ()
    history: tuple[LogEntry, ...] = ()
    """For curves."""
