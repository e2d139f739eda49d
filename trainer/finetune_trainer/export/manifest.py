"""The manifest: every file with its SHA-256, and what they were made from.

It is written last (publish.swap), so that nobody takes half of a version for a whole.
"""

from __future__ import annotations

import importlib.metadata
import platform
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import Field, JsonValue

from finetune_trainer.contract import (
    Artifact,
    Base,
    Fingerprints,
    GateReport,
    RunConfig,
    Stage,
    TrainingRecord,
)
from finetune_trainer.model import source

_PACKAGES = ("finetune-operator", "torch", "transformers", "trl", "peft", "llama-cpp-python")


class Lineage(Base):
    """What the files were made from."""

    dataset: str
    dataset_etag: Annotated[str, Field(alias="datasetETag")]
    dataset_rows: int
    eval_source: str | None = None
    """Where the held-out rows come from; None where they were split off."""

    eval_rows: int = 0
    columns: dict[str, str]
    model: str
    model_revision: str
    hyperparameters: dict[str, JsonValue]
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
    gate: GateReport
    """What was measured on the GGUF files."""


def lineage_of(config: RunConfig, trained: TrainingRecord) -> Lineage:
    """What the files are made from."""
    resolved = source.resolved_of(config)
    return Lineage(
        dataset=config.dataset.source,
        dataset_etag=resolved.dataset_etag,
        dataset_rows=resolved.dataset_rows,
        eval_source=config.dataset.eval_source,
        eval_rows=resolved.eval_rows,
        columns=config.dataset.columns.model_dump(exclude_none=True),
        model=config.model.source,
        model_revision=resolved.model_revision,
        hyperparameters=trained.hyperparameters,
        fingerprints=resolved.fingerprints,
        versions=versions(),
    )


def now() -> str:
    """The present time as RFC 3339, in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide on the result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
