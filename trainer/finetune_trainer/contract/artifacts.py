"""The files that a job leaves in its output folder, and manifest.json, which lists them.

They lie in `versions/<version>/` and never change once that folder's manifest.json is there. The
manifest.json of the output folder itself has the same bytes and names the current version.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue

from finetune_trainer.contract.base import Base, Stage
from finetune_trainer.contract.dataset_report import ShardReport
from finetune_trainer.contract.run import Fingerprints
from finetune_trainer.contract.verdict import REJECTED, GateReport, Quality

PART_BYTES = 50 * 10**9
"""A larger GGUF file is published in parts of so many bytes: that is the most that the Hugging Face
Hub long took, and what it and many registries still advise."""

_PART = re.compile(r"-(\d{5})-of-\d{5}(?=\.gguf$)")

VERSIONS = "versions"  # folder of the output with one folder for each version


def version_folder(version: str | None) -> str:
    """Where a version's files lie, below spec.output.uri; "" is that folder itself.

    There version 0.1.0, which knew no versions, left its only one.
    """
    return f"{VERSIONS}/{version}" if version else ""


class Artifact(Base):
    """One file of a version."""

    path: str
    """Path below the version's folder, e.g. gguf/model-Q4_K_M.gguf."""

    bytes: int
    sha256: str
    quality: Quality | None = None
    """Of a GGUF file that was checked; of the merged model beside the first file of its weights."""

    @property
    def rejected(self) -> bool:
        """Whether it is kept apart, as not good enough to be used."""
        return self.path.startswith(f"{REJECTED}/")

    @property
    def failed(self) -> bool:
        """Whether the quality gate found fault with it; with `verify: warn` it is used anyway."""
        return self.rejected or (self.quality is not None and not self.quality.passed)

    @property
    def whole(self) -> str:
        """Its path, or for a part of a GGUF file that of the whole."""
        return _PART.sub("", self.path)

    @property
    def follows(self) -> bool:
        """Whether it is a part of a GGUF file, and not the first, which stands for the others."""
        found = _PART.search(self.path)
        return found is not None and int(found[1]) > 1

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


class VersionSummary(Base):
    """A version that the output folder holds, in brief."""

    version: str
    """Name of its folder below versions/."""

    current: bool = False
    """Whether the output folder's manifest.json names it."""

    rejected: bool = False
    """Whether the quality gate refused one of its files."""

    created: str | None = None
    """RFC 3339. It and what follows is left out where its manifest doesn't say, and where not all
    fits into the termination message."""

    dataset_etag: Annotated[str | None, Field(alias="datasetETag")] = None
    dataset_rows: int | None = None
    model_revision: str | None = None
    eval_loss: float | None = None

    @property
    def name_alone(self) -> Self:
        """The same without what its manifest says of it."""
        return type(self)(version=self.version, current=self.current, rejected=self.rejected)


class ImageReference(Base):
    """An image in a container registry that holds one model of a version."""

    name: str
    """The model: merged, merged-fp8, adapter, or a type of GGUF file."""

    reference: str
    """Repository, tag and digest, as pods name it."""


class Lineage(Base):
    """What the files were made from."""

    dataset: str
    dataset_etag: Annotated[str, Field(alias="datasetETag")]
    dataset_files: tuple[ShardReport, ...] | None = None
    """The files, where they are several or lie on the Hub."""

    dataset_rows: int
    eval_source: str | None = None
    """Where the held-out rows come from; None where they were split off."""

    eval_files: tuple[ShardReport, ...] | None = None
    eval_rows: int = 0
    columns: dict[str, str]
    model: str
    model_revision: str
    """A digest over the base model's files; in a manifest of 0.1.0 a Hub model's commit."""

    model_commit: str | None = None
    """Commit of a Hub model."""

    init_from: str | None = None
    """The adapter that the training went on from, where it did."""

    init_revision: str | None = None
    """A digest over that adapter's files."""

    hyperparameters: dict[str, JsonValue]
    """As they were applied."""

    fingerprints: Fingerprints
    versions: dict[str, str]


class Manifest(Base):
    """The whole of manifest.json; its first fields are those of a Marker.

    In a version's folder it is written last, so that nobody takes half of a version for a whole.
    The same bytes in the output folder itself say which version is current.
    """

    stage: Literal[Stage.EXPORT] = Stage.EXPORT
    fingerprint: str
    version: str = ""
    """Name of its folder below versions/; empty in a manifest of 0.1.0, whose files lie in
    the output folder itself."""

    files: tuple[Artifact, ...]
    """Paths below the version's folder."""

    created: str
    """RFC 3339."""

    lineage: Lineage
    metrics: dict[str, float]
    gate: GateReport
    """What was measured on the GGUF files."""

    @property
    def folder(self) -> str:
        """Where the files lie, below spec.output.uri."""
        return version_folder(self.version)
