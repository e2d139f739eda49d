"""A version that was there before becomes the current one again, and nothing is computed.

Nothing is deleted either, whatever `output.keepVersions` says: the version of the spec itself is
there when `rollbackTo` goes.
"""

from __future__ import annotations

import logging

from finetune_trainer.contract import (
    DatasetSummary,
    Manifest,
    Reason,
    Resolved,
    Stage,
    StageError,
    StageResult,
)
from finetune_trainer.prepare.stored import read_prepared
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import Folder
from finetune_trainer.store.marker import MANIFEST, find_complete
from finetune_trainer.store.versions import (
    find_rollback,
    make_current,
    manifest_of,
    summarize_versions,
)

log = logging.getLogger(__name__)


def roll_back(output: Folder, name: str, reporter: Reporter) -> StageResult:
    """Let manifest.json name this version; the result is as if its own spec had been asked for.

    Raises StageError(VersionNotFound) unless the version is there as a whole.
    """
    reporter.message(f"Going back to version {name}")
    version = find_rollback(output, name)
    manifest = manifest_of(version)
    if manifest is None:
        raise StageError(
            Reason.VERSION_NOT_FOUND,
            f"spec.rollbackTo: {output.uri_of(version.manifest_path)} is a manifest of another "
            "release, which this trainer image can't read. Use the image that wrote it.",
        )
    make_current(output, version)
    log.info("%s names version %s", output.uri_of(MANIFEST), name)
    return StageResult(
        stage=Stage.PREPARE,
        reason=Reason.SUCCEEDED,
        message=f"rolled back to version {name} of {manifest.created}",
        resolved=_resolved(manifest),
        complete=tuple(Stage),
        artifacts=version.marker.files,
        version=name,
        manifest_uri=output.uri_of(version.manifest_path),
        versions=summarize_versions(output),
        metrics=manifest.metrics,
        dataset=_dataset(output, manifest),
    )


def _resolved(manifest: Manifest) -> Resolved:
    """What `prepare` found out then."""
    lineage = manifest.lineage
    return Resolved(
        fingerprints=lineage.fingerprints,
        dataset_etag=lineage.dataset_etag,
        dataset_rows=lineage.dataset_rows,
        eval_rows=lineage.eval_rows,
        model_revision=lineage.model_revision,
        model_commit=lineage.model_commit,
    )


def _dataset(output: Folder, manifest: Manifest) -> DatasetSummary | None:
    """What it found in the dataset, where the store still knows."""
    marker = find_complete(output, Stage.PREPARE, manifest.lineage.fingerprints.prepare)
    try:
        return read_prepared(output, marker).dataset if marker else None
    except (StageError, ValueError) as error:
        log.warning("What the dataset was like then can't be read: %s", error)
        return None
