"""What an export works with: what the stages before left, the tuned model, and where files go."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import (
    Artifact,
    DatasetReport,
    PreparedRunConfig,
    Quality,
    Quantization,
    RunConfig,
    Stage,
    TrainingRecord,
    display_name,
)
from finetune_trainer.export.gate.kept import KeptFigures, KeptFile
from finetune_trainer.export.gate.rows import ExampleFiles, count_lines
from finetune_trainer.export.gguf.files import GgufSource
from finetune_trainer.export.merge import MergedWeights
from finetune_trainer.export.merge.model_folder import assemble
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.loading import use_available_cpus
from finetune_trainer.model.tokenizer import begins_with_bos, load_tokenizer
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import Folder
from finetune_trainer.store.marker import (
    DATASET_REPORT,
    EXAMPLES,
    HELD_OUT,
    METRICS,
    open_stage,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportInputs:
    """What the stages before left."""

    adapter: Path
    """Folder with the adapter, or the whole model of a full training, and its tokenizer."""

    examples: ExampleFiles

    training: TrainingRecord

    dataset_report: Path

    @property
    def dataset(self) -> DatasetReport:
        return DatasetReport.model_validate_json(self.dataset_report.read_bytes())


def fetch_inputs(config: PreparedRunConfig, output: Folder, workspace: Path) -> ExportInputs:
    """Bring what the stages before left to the folder `workspace`; StageError if it changed."""
    prints, folder = config.resolved.fingerprints, config.training.result_folder
    trained = open_stage(output, Stage.TRAIN, prints.train)
    prepared = open_stage(output, Stage.PREPARE, prints.prepare)
    return ExportInputs(
        adapter=trained.fetch_folder(folder, workspace / folder),
        examples=fetch_examples(config, output, workspace),
        training=TrainingRecord.model_validate_json(trained.read(METRICS)),
        dataset_report=prepared.fetch(DATASET_REPORT, workspace / DATASET_REPORT),
    )


def fetch_examples(config: PreparedRunConfig, output: Folder, workspace: Path) -> ExampleFiles:
    """Bring the examples to the folder `workspace`; StageError if they changed."""
    prepared = open_stage(output, Stage.PREPARE, config.resolved.fingerprints.prepare)
    trained = prepared.fetch(EXAMPLES, workspace / EXAMPLES)
    if not config.resolved.eval_rows:
        return ExampleFiles(trained, None)
    held_out = prepared.fetch(HELD_OUT, workspace / HELD_OUT)
    split = DatasetReport.model_validate_json(prepared.read(DATASET_REPORT)).split
    listed = split.held_out if split else None
    known = listed is not None and listed.count == count_lines(held_out)
    return ExampleFiles(trained, held_out, listed if known else None)


class AddFile(Protocol):
    """Takes a finished file, which stays as it is from then on."""

    def __call__(self, file: Path, path: str, quality: Quality | None = None) -> Artifact | None:
        """`path` is its name in the output folder. Returns what it is there."""


class Uploads(Protocol):
    """What earlier attempts have uploaded of the same version."""

    def find(self, path: str) -> Artifact | None:
        """A file that is there."""

    def take(self, artifact: Artifact) -> None:
        """Let it be one of this version, without it being here."""

    def fetch(self, artifact: Artifact, target: Path) -> Path:
        """Bring it here; returns `target`."""


@dataclass(frozen=True)
class TunedModel:
    """Base model and adapter as one."""

    files: GgufSource
    weights: MergedWeights
    """Opened once: where the base has float32 weights, that reads all of them."""

    tokenizer: PreTrainedTokenizerBase


def open_tuned_model(
    config: RunConfig, base: ModelFolder, adapter: Path | None, folder: Path
) -> TunedModel:
    """Open base and adapter as one model, or `base` alone; raises StageError.

    `folder` gets the configuration and the tokenizer of the finished model, unless it is `base`
    itself, which has them.
    """
    use_available_cpus()
    weights = MergedWeights.open(base.path, adapter)
    if adapter:
        weights.check_changes()
        assemble(base, adapter, folder, dtype=weights.dtype)
    finished = replace(base, path=folder)
    tokenizer = load_tokenizer(finished)
    files = GgufSource(
        base=base,
        adapter=adapter,
        folder=finished,
        name=display_name(config.model.source),
        own_type=Quantization.BF16 if weights.dtype is torch.bfloat16 else Quantization.F16,
        begins_with_bos=begins_with_bos(tokenizer),
    )
    return TunedModel(files, weights, tokenizer)


@dataclass(frozen=True)
class ExportContext:
    config: RunConfig
    model: TunedModel
    examples: ExampleFiles
    result: Path
    """Folder for the files of the output."""

    workspace: Path
    add_file: AddFile
    reporter: Reporter
    discard: Callable[[Path], object] = lambda _: None
    """Takes a file that nothing here reads any more."""

    kept: KeptFigures = field(default_factory=KeptFigures)
    uploads: Uploads | None = None
    part_bytes: int | None = None
    """A larger GGUF file is published in parts of this size; None: files stay whole."""

    first_parts: dict[Path, Path] = field(default_factory=dict)
    """By the files that were."""

    @property
    def writes_merged(self) -> bool:
        """Whether the merged model is published; where it is what is converted, it is there."""
        return self.config.export.merged and self.model.files.adapter is not None

    @property
    def writes_weights(self) -> bool:
        """Whether its weights are written: GGUF files are made of them as well."""
        asked = self.config.export.merged or bool(self.config.export.gguf)
        return asked and self.model.files.adapter is not None

    def standing(self, name: str) -> KeptFile | None:
        """What an earlier attempt has checked and uploaded."""
        found = self.kept.file(name)
        there = found and self.uploads and self.uploads.find(found.artifact.path)
        return found if there and found and there.sha256 == found.artifact.sha256 else None

    def standing_folder(self, name: str) -> tuple[Artifact, ...]:
        """The same of a whole folder; empty where a file of it is missing."""
        found = [self.standing(each.artifact.path) for each in self.kept.folder(name)]
        whole = tuple(each.artifact for each in found if each)
        return whole if len(whole) == len(found) else ()

    def take(self, artifact: Artifact) -> None:
        """Let what is uploaded be part of this version."""
        log.info("%s was made and uploaded by an earlier attempt", artifact.path)
        if self.uploads:
            self.uploads.take(artifact)


def publish_folder(add_file: AddFile, folder: Path) -> tuple[Artifact, ...]:
    """Publish all files of a folder, which has its name in the output folder too."""
    added = [
        add_file(file, file.relative_to(folder.parent).as_posix()) for file in files_below(folder)
    ]
    return tuple(filter(None, added))


def files_below(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())
