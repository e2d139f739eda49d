"""The files that a job leaves in its output folder, and what was measured on them."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field

from finetune_trainer.contract.base import Base

REJECTED = "rejected"  # folder of the output for files that the quality gate refuses


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


class Artifact(Base):
    """One file that a job leaves in its output folder."""

    path: str
    """Path below spec.output.uri, e.g. gguf/model-Q4_K_M.gguf."""

    bytes: int
    sha256: str
    quality: Quality | None = None
    """Of a GGUF file that was checked."""

    @property
    def rejected(self) -> bool:
        """Whether it is kept apart, as not good enough to be used."""
        return self.path.startswith(f"{REJECTED}/")

    @property
    def failed(self) -> bool:
        """Whether the quality gate found fault with it; with `verify: warn` it is used anyway."""
        return self.rejected or (self.quality is not None and not self.quality.passed)

    @property
    def importance(self) -> int:
        """How badly status needs this row, where not all fit: 0 can best be done without."""
        if self.failed:
            return 4
        if self.path.endswith(".gguf"):
            return 3 if self.quality is not None else 2
        return 0 if self.path.startswith("merged/") else 1

    def brief(self) -> Self:
        """The same with rounded figures."""
        if self.quality is None:
            return self
        return self.model_copy(update={"quality": self.quality.rounded()})
