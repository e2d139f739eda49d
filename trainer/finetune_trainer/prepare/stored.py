"""What the store already holds for a run, and the fingerprints that tell; going back to a version.

A bucket that 0.1.0 wrote is found by the fingerprints of then, and kept: it let a training depend
on how its rows were asked for, and on a Hub model's commit. Its markers are read once and written
again under today's fingerprints; nothing big is copied.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from functools import cached_property

from pydantic import ValidationError

from finetune_trainer.contract import (
    DatasetSummary,
    ExampleContents,
    Export,
    Fingerprints,
    ImageReference,
    Manifest,
    Output,
    Reason,
    Resolved,
    RunConfig,
    Stage,
    StageError,
    StageResult,
    TrainingRecord,
    digest,
    later_fingerprints,
    prepare_fingerprint,
)
from finetune_trainer.model import initial_adapter
from finetune_trainer.model.base_model import BaseModelFiles, former_revision
from finetune_trainer.prepare.dataset_files import DataFiles
from finetune_trainer.prepare.findings import Prepared
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import Folder
from finetune_trainer.store.marker import (
    EXAMPLES,
    HELD_OUT,
    MANIFEST,
    METRICS,
    SUMMARY,
    Marker,
    PushedImages,
    StageFiles,
    find_complete,
    image_pushes,
    last_push,
    stage_folder,
    write_marker,
)
from finetune_trainer.store.versions import (
    Version,
    adopt_first_manifest,
    find_pushed,
    find_rollback,
    find_version,
    make_current,
    manifest_of,
    summarize_versions,
)

log = logging.getLogger(__name__)

CompleteStages = dict[Stage, Marker]
"""Stages whose result for their fingerprint the store holds."""


@dataclass(frozen=True)
class StoredRun:
    """A request to `prepare`, and where its results are or will be."""

    config: RunConfig
    output: Folder
    fingerprint: str
    """Of `prepare`."""

    model_revision: str
    init_revision: str | None
    """Of the adapter that the training goes on from."""

    former: FormerRun

    def find_prepared(self) -> Marker | None:
        """The examples for this request, where they are there."""
        found = find_complete(self.output, Stage.PREPARE, self.fingerprint)
        return found or self.former.adopt_prepared(self.fingerprint)

    def find_later(
        self, prepared: Marker, summary: Prepared
    ) -> tuple[Fingerprints, CompleteStages]:
        """All fingerprints, now that the examples are there, and the later stages that need not
        run again."""
        contents = contents_of(prepared, summary)
        prints = later_fingerprints(
            self.config, self.fingerprint, contents, self.model_revision, self.init_revision
        )
        found = {
            Stage.TRAIN: find_complete(self.output, Stage.TRAIN, prints.train)
            or self.former.adopt_trained(prepared, prints.train),
            Stage.EXPORT: find_complete(self.output, Stage.EXPORT, prints.export)
            or self.former.adopt_published(prepared, prints),
        }
        complete = {stage: marker for stage, marker in found.items() if marker}
        if exported := complete.get(Stage.EXPORT):
            prints = prints.model_copy(update={"export": exported.fingerprint})
        if not complete and (former := self.former.unfinished_training(prepared)):
            # It goes on from its checkpoints, and keeps its Job where that still runs.
            prints = prints.model_copy(update={"train": former})
        return prints, without_push(complete, self.output, self.config.output, self.config.export)


def stored_run(
    config: RunConfig, output: Folder, files: DataFiles, model: BaseModelFiles
) -> StoredRun:
    """The run for one version of its dataset and of its base model."""
    etag, initial = files.rows.info.etag, initial_adapter.find(config)
    eval_etag = files.held_out.info.etag if files.held_out else None
    return StoredRun(
        config=config,
        output=output,
        fingerprint=prepare_fingerprint(config, etag, model.revision, eval_etag),
        model_revision=model.revision,
        init_revision=initial.revision if initial else None,
        former=FormerRun(output, config, model, etag, eval_etag),
    )


def without_push(
    complete: CompleteStages, output: Folder, asked: Output, export: Export
) -> CompleteStages:
    """The same, but for an export that has still to push."""
    hub, oci = asked.hub, asked.oci
    if Stage.EXPORT not in complete or not (hub or oci):
        return complete
    version = find_version(output, complete[Stage.EXPORT].fingerprint)
    pushed = version is not None and (hub is None or find_pushed(output, hub, version) is not None)
    if pushed and version and oci:
        wanted = PushedImages.wanted(oci, export, version.data)
        pushed = last_push(output, wanted) is not None
    # The export has only to push. It needs no training, even where the store holds none.
    return complete if pushed else {Stage.TRAIN: complete[Stage.EXPORT]}


def images_of(output: Folder, version: Version) -> tuple[ImageReference, ...]:
    """The images that the last push of a version left."""
    sha256 = hashlib.sha256(version.data).hexdigest()
    pushes = (each for each in image_pushes(output) if each.manifest_sha256 == sha256)
    return next((each.images for each in pushes), ())


def read_prepared(output: Folder, marker: Marker) -> Prepared:
    """What is known of the examples; StageError where summary.json is not the one listed."""
    return Prepared.model_validate_json(StageFiles(output, marker).read(SUMMARY))


def metrics_of(output: Folder, complete: CompleteStages) -> dict[str, float]:
    """The figures of a training that the store holds, for status; none where they can't be read."""
    marker = complete.get(Stage.TRAIN)
    if marker is None or marker.stage is not Stage.TRAIN:
        return {}
    try:
        data = StageFiles(output, marker).read(METRICS)
        return TrainingRecord.model_validate_json(data).metrics.named()
    except (StageError, ValidationError) as error:
        log.warning("The figures of the training that is there can't be read: %s", error)
        return {}


def contents_of(marker: Marker, summary: Prepared) -> ExampleContents:
    """The examples as far as a training depends on them."""
    examples = marker.sha256_of(EXAMPLES)
    if examples is None:
        raise ValueError(f"the marker of prepare {marker.fingerprint} lists no {EXAMPLES}")
    return ExampleContents(
        examples=examples,
        held_out=marker.sha256_of(HELD_OUT),
        cut=summary.dataset.truncated > summary.left_out,
        longest=summary.tokens.max,
    )


# The formula of 0.1.0. It must stay as it was, with the defaults of then (a test holds those).
_RECIPE = {Stage.PREPARE: 1, Stage.TRAIN: 1, Stage.EXPORT: 2}
_UNCHANGING = {
    "checkpoint_steps",
    "gpu_memory",
    "gradient_checkpointing",
    "logging_steps",
    "parallelism",
    "report_to",
}


def former_fingerprints(
    config: RunConfig, dataset_etag: str, model_revision: str, eval_etag: str | None = None
) -> Fingerprints:
    """The fingerprints of 0.1.0, each of which contains the one of the stage before."""
    prepare = digest(
        {
            "recipe": _RECIPE[Stage.PREPARE],
            "dataset": config.dataset.model_dump(
                mode="json", exclude={"storage"}, exclude_defaults=True
            ),
            "datasetETag": dataset_etag,
            "evalETag": eval_etag,
            "splitSeed": config.training.seed if config.dataset.splits else None,
            "model": config.model.model_dump(
                mode="json", exclude={"revision", "storage"}, exclude_defaults=True
            ),
            "modelRevision": model_revision,
            "maxSequenceLength": config.training.max_sequence_length,
        }
    )
    train = digest(
        {
            "recipe": _RECIPE[Stage.TRAIN],
            "prepare": prepare,
            "training": config.training.model_dump(
                mode="json", exclude=_UNCHANGING, exclude_defaults=True
            ),
        }
    )
    export = digest(
        {
            "recipe": _RECIPE[Stage.EXPORT],
            "train": train,
            "merged": config.export.merged,
            "gguf": sorted(config.export.gguf),
            **config.export.model_dump(
                mode="json", exclude={"merged", "gguf"}, exclude_defaults=True
            ),
        }
    )
    return Fingerprints(prepare=prepare, train=train, export=export)


@dataclass(frozen=True)
class FormerRun:
    """The same run as 0.1.0 would have done it, and what the store holds of that."""

    output: Folder
    config: RunConfig
    model: BaseModelFiles
    dataset_etag: str
    eval_etag: str | None

    @cached_property
    def prints(self) -> Fingerprints:
        revision = former_revision(self.model, self.config.model_storage)
        return former_fingerprints(self.config, self.dataset_etag, revision, self.eval_etag)

    def adopt_prepared(self, fingerprint: str) -> Marker | None:
        """Mark its examples with today's fingerprint, where they are there."""
        return self._adopt(Stage.PREPARE, self.prints.prepare, fingerprint)

    def adopt_trained(self, prepared: Marker, fingerprint: str) -> Marker | None:
        """Mark its adapter with today's fingerprint, where it learnt from these examples."""
        if not self._same_examples(prepared):
            return None
        return self._adopt(Stage.TRAIN, self.prints.train, fingerprint)

    def adopt_published(self, prepared: Marker, prints: Fingerprints) -> Marker | None:
        """Mark its artifacts with today's fingerprint, where they are there.

        A version that was made of it after the upgrade can't change: that keeps its fingerprint.
        """
        if not self._same_examples(prepared):
            return None
        former = find_complete(self.output, Stage.EXPORT, self.prints.export)
        if former is None:
            return None
        adopt_first_manifest(self.output, self.prints.export, prints)
        return find_complete(self.output, Stage.EXPORT, prints.export) or former

    def unfinished_training(self, prepared: Marker) -> str | None:
        """The fingerprint of its training, where that has left checkpoints to go on from."""
        checkpoints = f"{stage_folder(Stage.TRAIN, self.prints.train)}/checkpoints/"
        if self._same_examples(prepared) and self.output.list(checkpoints):
            return self.prints.train
        return None

    def _adopt(self, stage: Stage, former: str, fingerprint: str) -> Marker | None:
        found = None if former == fingerprint else find_complete(self.output, stage, former)
        if found is None:
            return None
        log.info("The result of %s that 0.1.0 left is taken over", stage)
        update = {"fingerprint": fingerprint, "folder": found.base}
        marker = found.model_copy(update=update)
        write_marker(self.output, marker)
        return marker

    @cached_property
    def _former_examples(self) -> Marker | None:
        return find_complete(self.output, Stage.PREPARE, self.prints.prepare)

    def _same_examples(self, prepared: Marker) -> bool:
        """Whether its training learnt from these examples; where its own are gone, from what the
        same spec asks for."""
        former = self._former_examples
        names = (EXAMPLES, HELD_OUT)
        return former is None or all(
            former.sha256_of(name) == prepared.sha256_of(name) for name in names
        )


def roll_back(output: Folder, name: str, reporter: Reporter) -> StageResult:
    """Let manifest.json name this version; the result is as if its own spec had been asked for.

    Nothing is computed and nothing deleted, whatever `output.keepVersions` says: the version of the
    spec itself is there when `rollbackTo` goes.

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
        resolved=_resolved_then(manifest),
        complete=tuple(Stage),
        artifacts=version.marker.files,
        images=images_of(output, version),
        version=name,
        manifest_uri=output.uri_of(version.manifest_path),
        versions=summarize_versions(output),
        metrics=manifest.metrics,
        dataset=_dataset_then(output, manifest),
    )


def _resolved_then(manifest: Manifest) -> Resolved:
    """What `prepare` found out then."""
    lineage = manifest.lineage
    return Resolved(
        fingerprints=lineage.fingerprints,
        dataset_etag=lineage.dataset_etag,
        dataset_rows=lineage.dataset_rows,
        eval_rows=lineage.eval_rows,
        model_revision=lineage.model_revision,
        model_commit=lineage.model_commit,
        init_revision=lineage.init_revision,
    )


def _dataset_then(output: Folder, manifest: Manifest) -> DatasetSummary | None:
    """What it found in the dataset, where the store still knows."""
    marker = find_complete(output, Stage.PREPARE, manifest.lineage.fingerprints.prepare)
    try:
        return read_prepared(output, marker).dataset if marker else None
    except (StageError, ValueError) as error:
        log.warning("What the dataset was like then can't be read: %s", error)
        return None
