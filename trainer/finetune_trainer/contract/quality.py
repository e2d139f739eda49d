"""What the gate finds out about the files of an export; the manifest and the report show it."""

from __future__ import annotations

from finetune_trainer.contract.artifacts import Quality
from finetune_trainer.contract.base import Base
from finetune_trainer.contract.output import Quantization


class FileCheck(Base):
    """One GGUF file, as llama.cpp reads it."""

    file: str
    """Its name, e.g. model-Q4_K_M.gguf."""

    quantization: Quantization
    problems: tuple[str, ...] = ()
    """Why it may not be used, in sentences; empty when it may."""

    quality: Quality | None = None
    """None where nothing was measured (verify: off, or no held-out rows to measure on)."""

    @property
    def passed(self) -> bool:
        """Whether the file may be used."""
        return not self.problems


class Sample(Base):
    """A held-out prompt, and what the models answer to it with greedy decoding."""

    prompt: str
    expected: str
    base: str | None = None
    """The base model's answer; None where it was not asked."""

    tuned: str
    """The answer of the merged model's largest GGUF file."""

    stopped: bool
    """Whether the tuned model ended its answer itself."""


class GateReport(Base):
    """Everything that was measured on the files of one export."""

    rows: int = 0
    """Rows whose answers were measured on."""

    tokens: int = 0
    """Tokens of these answers."""

    held_out: bool = True
    """False where the dataset has no held-out rows, and training rows stand in for them."""

    base_perplexity: float | None = None
    """Of the base model on these tokens."""

    tuned_perplexity: float | None = None
    """Of base model and adapter by transformers, before any conversion."""

    files: tuple[FileCheck, ...] = ()
    samples: tuple[Sample, ...] = ()
