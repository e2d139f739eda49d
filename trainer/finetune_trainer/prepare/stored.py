"""What the store already holds for a run, and the fingerprints that tell."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from pydantic import ValidationError

from finetune_trainer.contract import (
    ExampleContents,
    Fingerprints,
    Hub,
    RunConfig,
    Stage,
    StageError,
    TrainingRecord,
    later_fingerprints,
    prepare_fingerprint,
)
from finetune_trainer.model.base_model import BaseModelFiles
from finetune_trainer.prepare.dataset_files import DataFiles
from finetune_trainer.prepare.report import Prepared
from finetune_trainer.prepare.upgrade import FormerRun
from finetune_trainer.store import Folder
from finetune_trainer.store.marker import (
    EXAMPLES,
    HELD_OUT,
    METRICS,
    SUMMARY,
    Marker,
    StageFiles,
    find_complete,
)
from finetune_trainer.store.versions import find_pushed, find_version

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
        prints = later_fingerprints(self.config, self.fingerprint, contents, self.model_revision)
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
        return prints, without_push(complete, self.output, self.config.output.hub)


def stored_run(
    config: RunConfig, output: Folder, files: DataFiles, model: BaseModelFiles
) -> StoredRun:
    """The run for one version of its dataset and of its base model."""
    etag = files.rows.info.etag
    eval_etag = files.held_out.info.etag if files.held_out else None
    return StoredRun(
        config=config,
        output=output,
        fingerprint=prepare_fingerprint(config, etag, model.revision, eval_etag),
        model_revision=model.revision,
        former=FormerRun(output, config, model, etag, eval_etag),
    )


def without_push(complete: CompleteStages, output: Folder, hub: Hub | None) -> CompleteStages:
    """The same, but for an export that has still to push."""
    if hub is None or Stage.EXPORT not in complete:
        return complete
    version = find_version(output, complete[Stage.EXPORT].fingerprint)
    if version and find_pushed(output, hub, version):
        return complete
    # The export has only to push. It needs no training, even where the store holds none.
    return {Stage.TRAIN: complete[Stage.EXPORT]}


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
