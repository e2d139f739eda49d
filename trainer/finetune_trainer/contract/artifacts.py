"""The files that a job leaves in its output folder."""

from __future__ import annotations

from typing import Self

from finetune_trainer.contract.base import Base
from finetune_trainer.contract.quality import Quality

REJECTED = "rejected"  # folder of the output for files that the quality gate refuses


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
    def priority_in_message(self) -> int:
        """How badly status needs this file, where not all fit: 0 can best be done without."""
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
