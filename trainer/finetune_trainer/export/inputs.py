"""What an export works with: what the stages before left, the tuned model, and where files go.

Below is how a file is published that was checked, and how one comes back that was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import (
    REJECTED,
    Artifact,
    DatasetReport,
    FileVerdict,
    PreparedRunConfig,
    Quality,
    Quantization,
    RunConfig,
    Stage,
    TrainingRecord,
    display_name,
)
from finetune_trainer.export.gate import rejects
from finetune_trainer.export.gate.kept import KeptFigures, KeptFile
from finetune_trainer.export.gate.rows import ExampleFiles, count_lines
from finetune_trainer.export.gguf.files import GgufSource, file_name, write_parts
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

MERGED, MERGED_FP8, GGUF = "merged", "merged-fp8", "gguf"

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


class CheckedFile(NamedTuple):
    """A GGUF file of the merged model with its verdict."""

    kind: Quantization
    file: Path
    verdict: FileVerdict


def fetch(context: ExportContext, artifact: Artifact) -> Path:
    """Bring a GGUF file here that an earlier attempt has uploaded, unless it is here."""
    target = context.result / GGUF / artifact.path.rpartition("/")[2]
    if target.exists() or context.uploads is None:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    return context.uploads.fetch(artifact, target)


def some_file(context: ExportContext, files: Sequence[CheckedFile]) -> Path:
    """The smallest of them that is here; where none is, the smallest that was uploaded."""
    here = [each.file for each in files if each.file.exists()]
    if here:
        return min(here, key=lambda file: file.stat().st_size)
    uploaded = [context.standing(gguf_path(context, each.kind)) for each in files]
    return fetch(
        context, min((each.artifact for each in uploaded if each), key=lambda item: item.bytes)
    )


def publish_file(
    context: ExportContext,
    file: Path,
    verdict: FileVerdict,
    path: str,
    alike: tuple[bool, ...] = (),
    *,
    asked: bool = True,
) -> None:
    """Publish a checked file as `path`, or apart, if it was asked for; and keep its verdict."""
    artifact = None
    if asked:
        place = f"{REJECTED}/{file.name}" if rejects(context.config.export, verdict) else path
        if context.part_bytes is None or file.stat().st_size <= context.part_bytes:
            artifact = context.add_file(file, place, verdict.quality)
        else:  # a retry makes it again, since one part doesn't say that all were uploaded
            publish_parts(context, file, verdict, place)
    context.kept.add_checked(path, file, artifact, verdict, alike)


def publish_parts(context: ExportContext, file: Path, verdict: FileVerdict, path: str) -> None:
    """Publish a file in parts, the first with its figures, since that is what a server loads."""
    parts = write_parts(file, context.part_bytes or 0)
    context.first_parts[file] = parts[0]
    for part in parts:
        quality = verdict.quality if part is parts[0] else None
        context.add_file(part, f"{path.rpartition('/')[0]}/{part.name}", quality)
        context.discard(part)


def gguf_path(context: ExportContext, kind: Quantization) -> str:
    """Where a GGUF file is published, if it isn't rejected."""
    return f"{GGUF}/{file_name(context.model.files.name, kind)}"


def publish_merged(
    context: ExportContext, verdict: FileVerdict, there: Sequence[Artifact] = ()
) -> None:
    """Publish the merged model in its folder, or apart; its first weights bear the figures.

    `there` is what of it an earlier attempt has uploaded.
    """
    if there:
        for artifact in there:
            context.take(artifact)
        return
    folder = context.model.files.folder.path
    apart = f"{REJECTED}/" if rejects(context.config.export, verdict) else ""
    first = next(file for file in files_below(folder) if file.suffix == ".safetensors")
    added = []
    for file in files_below(folder):
        quality = verdict.quality if file == first else None
        path = apart + file.relative_to(folder.parent).as_posix()
        added.append(context.add_file(file, path, quality))
    context.kept.add_folder(MERGED, [artifact for artifact in added if artifact])
