"""A bucket that 0.1.0 wrote: what it holds is found by the fingerprints of then, and kept.

0.1.0 let a training depend on how its rows were asked for, and on a Hub model's commit. Its markers
are read once and written again under today's fingerprints; nothing big is copied. The formula below
is frozen: it must stay as it was, with the defaults of then (a test holds those).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property

from finetune_trainer.contract import Fingerprints, RunConfig, Stage, digest
from finetune_trainer.model.base_model import BaseModelFiles, former_revision
from finetune_trainer.store import Folder
from finetune_trainer.store.marker import (
    EXAMPLES,
    HELD_OUT,
    Marker,
    find_complete,
    stage_folder,
    write_marker,
)
from finetune_trainer.store.versions import adopt_first_manifest

_RECIPE = {Stage.PREPARE: 1, Stage.TRAIN: 1, Stage.EXPORT: 2}
_UNCHANGING = {
    "checkpoint_steps",
    "gpu_memory",
    "gradient_checkpointing",
    "logging_steps",
    "parallelism",
    "report_to",
}

log = logging.getLogger(__name__)


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
        """Its fingerprints."""
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
