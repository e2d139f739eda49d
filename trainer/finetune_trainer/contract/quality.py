"""What the gate finds out about the GGUF files of an export."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, ValidationInfo, field_validator

from finetune_trainer.contract.base import Base
from finetune_trainer.contract.output import Quantization


class Quality(Base):
    """What was measured on a GGUF file in llama.cpp, over the answers of held-out rows; of training
    rows where none are held out."""

    kl_divergence: Annotated[float, Field(alias="klDivergence")]
    """Mean Kullback-Leibler divergence of the next token, in nats per token: of a quantization from
    the 16-bit file that it was made of; of that file from base model and adapter; of the adapter's
    own file, which is taken away from that file, from the base model."""

    same_top_token: float
    """Share of tokens at which both find the same next token most likely, 0 to 1."""

    perplexity: float
    """Perplexity of the answers; of the adapter's own file, with it taken away."""

    max_kl_divergence: Annotated[float | None, Field(alias="maxKLDivergence")] = None
    """The limit that the divergence was held against."""

    passed: bool = True
    """Whether the file may be used: false where the divergence is over its limit, or where
    llama.cpp reads the file otherwise than it was trained."""

    @property
    def over_limit(self) -> bool:
        """Whether the divergence is over its limit."""
        return self.max_kl_divergence is not None and self.kl_divergence > self.max_kl_divergence

    def rounded(self) -> Self:
        """The same with six significant digits a figure, which is more than they are worth."""
        figures = {name: value for name, value in self if isinstance(value, float)}
        short = {name: float(f"{value:.6g}") for name, value in figures.items()}
        return self.model_copy(update=short)


class FileVerdict(Base):
    """The gate's verdict on one GGUF file: it passes where the gate found no problem."""

    file: str
    """Its name, e.g. model-Q4_K_M.gguf."""

    quantization: Quantization
    problems: tuple[str, ...] = ()
    """Why it may not be used, in sentences; empty when it may."""

    quality: Quality | None = None
    """None where nothing was measured (verify: off, or no held-out rows to measure on)."""

    @field_validator("quality")
    @classmethod
    def _says_the_same(cls, quality: Quality | None, info: ValidationInfo) -> Quality | None:
        # `passed` travels with the figures, into status and into the manifest's list of files. So
        # it is the verdict of the whole file and not of its divergence alone, also where a manifest
        # of an earlier version said otherwise.
        if quality is None or "problems" not in info.data:
            return quality
        return quality.model_copy(update={"passed": not info.data["problems"]})

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

    files: tuple[FileVerdict, ...] = ()
    samples: tuple[Sample, ...] = ()
