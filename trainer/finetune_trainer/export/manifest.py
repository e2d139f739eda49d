"""The manifest: every file with its SHA-256, and what they were made from.

It is written last. While a new version is uploaded there is no manifest, so that nobody takes half
of the old and half of the new for a whole.
"""

from __future__ import annotations

import importlib.metadata
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from finetune_trainer.config import Base, Fingerprints, Resolved, RunConfig, Stage
from finetune_trainer.export.verify import Check
from finetune_trainer.marker import MANIFEST, Marker
from finetune_trainer.outcome import Artifact
from finetune_trainer.storage import Folder, OnBytes

FORMER = "manifest.former.json"  # the manifest that is being replaced, for its list of files
_PACKAGES = ("finetune-operator", "torch", "transformers", "trl", "peft", "llama-cpp-python")


class Lineage(Base):
    """What the files were made from."""

    dataset: str
    dataset_etag: Annotated[str, Field(alias="datasetETag")]
    dataset_rows: int
    columns: dict[str, str]
    model: str
    model_revision: str
    hyperparameters: dict[str, Any]
    """As they were applied."""

    fingerprints: Fingerprints
    versions: dict[str, str]


class Manifest(Base):
    """The whole of manifest.json; its first fields are those of a Marker."""

    stage: Literal[Stage.EXPORT] = Stage.EXPORT
    fingerprint: str
    files: tuple[Artifact, ...]
    created: str
    """RFC 3339."""

    lineage: Lineage
    metrics: dict[str, float]
    checks: tuple[Check, ...]
    """What each GGUF file answered."""


def build(
    config: RunConfig,
    resolved: Resolved,
    files: list[Artifact],
    trained: dict[str, Any],
    checks: list[Check],
) -> Manifest:
    """Put the manifest together; `trained` is what metrics.json holds."""
    lineage = Lineage(
        dataset=config.dataset.source,
        dataset_etag=resolved.dataset_etag,
        dataset_rows=resolved.dataset_rows,
        columns=config.dataset.columns.model_dump(exclude_none=True),
        model=config.model.source,
        model_revision=resolved.model_revision,
        hyperparameters=trained["hyperparameters"],
        fingerprints=resolved.fingerprints,
        versions=versions(),
    )
    return Manifest(
        fingerprint=resolved.fingerprints.export,
        files=tuple(files),
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        lineage=lineage,
        metrics=trained["metrics"],
        checks=tuple(checks),
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide on the result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def publish(output: Folder, manifest: Manifest, result: Path, on_bytes: OnBytes) -> None:
    """Replace what the output folder holds: old manifest away, files, manifest, stale files away.

    When this is interrupted, the next run finds the former list of files and cleans up after both.
    """
    former = former_files(output)
    if (old := output.read(MANIFEST)) is not None:
        output.write(FORMER, old)
        output.delete([MANIFEST])
    for item in manifest.files:
        output.upload(result / item.path, item.path, on_bytes)
    output.write(MANIFEST, manifest.model_dump_json(indent=2).encode() + b"\n")
    stale = former - {item.path for item in manifest.files}
    output.delete([*sorted(stale), FORMER])


def former_files(output: Folder) -> set[str]:
    """Files that earlier manifests of this folder list."""
    paths: set[str] = set()
    for name in (MANIFEST, FORMER):
        data = output.read(name)
        if data is None:
            continue
        try:
            paths.update(item.path for item in Marker.model_validate_json(data).files)
        except ValidationError:
            continue  # not ours; its files are left alone
    return paths
