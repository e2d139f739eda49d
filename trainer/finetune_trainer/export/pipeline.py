"""An export from its inputs to its models: merged, as GGUF, and each GGUF file through the gate.

A file is published as soon as it is finished and checked, so that it can be uploaded while the next
one is computed.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import (
    REJECTED,
    DatasetReport,
    FileVerdict,
    GateReport,
    PreparedRunConfig,
    Quality,
    Quantization,
    Reason,
    RunConfig,
    Sample,
    Stage,
    StageError,
    TrainingRecord,
    display_name,
)
from finetune_trainer.export.gate import DerivedGate, SourceGate, rejects
from finetune_trainer.export.gate.expected import GateInputs
from finetune_trainer.export.gate.rows import ExampleFiles, count_lines, read_examples
from finetune_trainer.export.gguf.files import (
    IMPORTANCE_TYPES,
    GgufSource,
    adapter_file_name,
    write_adapter,
    write_files,
)
from finetune_trainer.export.gguf.importance import write_importance
from finetune_trainer.export.merge import MergedWeights
from finetune_trainer.export.merge.model_folder import (
    assemble,
    generation_settings,
    write_merged,
)
from finetune_trainer.export.ollama import write_modelfile
from finetune_trainer.memory.machine import free_memory
from finetune_trainer.memory.predict import check_disk, export_disk
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.loading import use_available_cpus
from finetune_trainer.model.shape import Shape
from finetune_trainer.model.tokenizer import begins_with_bos, load_tokenizer
from finetune_trainer.runtime import GIB, binary
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import Folder
from finetune_trainer.store.marker import (
    DATASET_REPORT,
    EXAMPLES,
    HELD_OUT,
    METRICS,
    open_stage,
)

T = TypeVar("T")

MERGED, GGUF = "merged", "gguf"

log = logging.getLogger(__name__)


class AddFile(Protocol):
    """Takes a finished file, which stays as it is from then on."""

    def __call__(self, file: Path, path: str, quality: Quality | None = None) -> object:
        """`path` is its name in the output folder."""


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

    @property
    def writes_merged(self) -> bool:
        """Whether the merged model is written; where it is what is converted, it is there."""
        return self.config.export.merged and self.model.files.adapter is not None


class CheckedFile(NamedTuple):
    """A GGUF file of the merged model with its verdict."""

    kind: Quantization
    file: Path
    verdict: FileVerdict


def publish_folder(add_file: AddFile, folder: Path) -> None:
    """Publish all files of a folder, which has its name in the output folder too."""
    for file in files_below(folder):
        add_file(file, file.relative_to(folder.parent).as_posix())


def files_below(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def make_models(context: ExportContext) -> GateReport:
    """Write the merged model and GGUF files with their Modelfile, and check each.

    Raises StageError.
    """
    merged = make_merged(context) if context.writes_merged else None
    context.reporter.message("Asking the tuned model, for what its files are held against")
    source_gate = SourceGate.open(gate_inputs(context, merged), context.workspace / "gate")
    verdict = source_gate.check_merged(context.model.files.own_type)
    if verdict:
        publish_merged(context, verdict)
    found = make_gguf(context, source_gate) if context.config.export.gguf else None
    if found is None:
        found = source_gate.report(source_gate.merged_samples())
    return found.model_copy(update={"merged": verdict})


def gate_inputs(context: ExportContext, merged: ModelFolder | None) -> GateInputs:
    """What files are held against, and on which rows."""
    rows = context.examples
    return GateInputs(
        base=context.model.files.base,
        adapter=context.model.files.adapter,
        examples=rows.measured(),
        names=rows.names(),
        export=context.config.export,
        held_out=rows.held_out is not None,
        merged=merged,
        reporter=context.reporter,
    )


def make_merged(context: ExportContext) -> ModelFolder:
    """Write the merged model's weights beside its configuration."""
    model = context.model
    total = sum(
        math.prod(each.shape) * each.dtype.itemsize for each in model.weights.infos.values()
    )
    moved = context.reporter.transfer("Merging the adapter into the base model", total)
    write_merged(model.weights, model.files.folder.path, moved)
    return model.files.folder


def publish_merged(context: ExportContext, verdict: FileVerdict) -> None:
    """Publish the merged model in its folder, or apart; its first weights bear the figures."""
    folder = context.model.files.folder.path
    apart = f"{REJECTED}/" if rejects(context.config.export, verdict) else ""
    first = next(file for file in files_below(folder) if file.suffix == ".safetensors")
    for file in files_below(folder):
        quality = verdict.quality if file == first else None
        context.add_file(file, apart + file.relative_to(folder.parent).as_posix(), quality)


def make_gguf(context: ExportContext, source_gate: SourceGate) -> GateReport:
    """Write GGUF files and Modelfile below the result, and check each; raises StageError."""
    config, model, reporter = context.config, context.model.files, context.reporter
    importance = None
    if config.export.importance_matrix and set(config.export.gguf) & set(IMPORTANCE_TYPES):
        importance = context.workspace / "importance.gguf"
    written = write_files(
        model,
        context.result / GGUF,
        config.export.gguf,
        importance=importance,
        reporter=reporter,
    )
    with ThreadPoolExecutor(1, "adapter") as beside:  # each imports for seconds on one CPU
        adapter_made = beside.submit(make_adapter, context)
        kind, source_file = next(written)
        reporter.message(f"Checking {source_file.name}")
        gate = source_gate.check(source_file, kind)
        if kind in config.export.gguf:
            publish_file(context, source_file, gate.source_verdict)
        adapter = adapter_made.result()
    adapter_verdicts: list[FileVerdict] = []
    if adapter:
        reporter.message(f"Checking {adapter.name}")
        adapter_verdicts.append(gate.check_adapter(adapter))
        if config.export.adapter_gguf is not False:
            publish_file(context, adapter, adapter_verdicts[0])
    if importance:
        rows = read_examples(context.examples.trained)
        write_importance(model, source_file, rows, importance, reporter)
    source = CheckedFile(kind, source_file, gate.source_verdict)
    files = [source]
    files += check_derived(context, gate, written)
    samples = take_samples(context, gate, files, adapter)
    make_modelfile(context, files)
    derived = (each.verdict for each in files[1:])
    return gate.report([*adapter_verdicts, *derived], samples)


def make_adapter(context: ExportContext) -> Path | None:
    """The adapter alone as GGUF; None if llama.cpp can't apply it and the spec doesn't ask."""
    model = context.model.files
    if model.adapter is None:
        return None
    target = context.result / GGUF / adapter_file_name(model.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_adapter(model.folder, model.adapter, target)
    except StageError as error:
        if context.config.export.adapter_gguf:
            raise
        log.warning("There is no GGUF file of the adapter alone: %s", error.message)
        return None
    return target


def check_derived(
    context: ExportContext, gate: DerivedGate, written: Iterator[tuple[Quantization, Path]]
) -> Iterator[CheckedFile]:
    """Check and publish each file before the next one is asked for."""
    for kind, file in written:
        context.reporter.message(f"Checking {file.name}")
        verdict = gate.check(file, kind)
        publish_file(context, file, verdict)
        yield CheckedFile(kind, file, verdict)


def take_samples(
    context: ExportContext, gate: DerivedGate, files: list[CheckedFile], adapter: Path | None
) -> tuple[Sample, ...]:
    """Answers of the smallest file that passed and is still there, which is the fastest."""
    passed = [each.file for each in files if each.verdict.passed and each.file.exists()]
    if not passed:
        return ()
    smallest = min(passed, key=lambda file: file.stat().st_size)
    context.reporter.message(f"Asking {smallest.name} and the base model the same questions")
    return gate.samples(smallest, adapter)


def publish_file(context: ExportContext, file: Path, verdict: FileVerdict) -> None:
    """Publish a checked file among the good ones, or apart."""
    folder = REJECTED if rejects(context.config.export, verdict) else GGUF
    context.add_file(file, f"{folder}/{file.name}", verdict.quality)


def make_modelfile(context: ExportContext, files: list[CheckedFile]) -> None:
    """Write the Modelfile for the files that may be used, if there are any."""
    config, model = context.config, context.model
    usable = [
        each
        for each in files
        if each.kind in config.export.gguf and not rejects(config.export, each.verdict)
    ]
    # With `verify: warn` some may have failed. The Modelfile names them only if all have.
    good = [each for each in usable if each.verdict.passed] or usable
    if not good:
        return
    file = write_modelfile(
        context.result,
        {each.kind: each.file for each in good},
        model.tokenizer,
        config,
        parameters=sum(math.prod(info.shape) for info in model.weights.infos.values()),
        generation=generation_settings(model.files.folder),
    )
    context.add_file(file, file.name)


@dataclass(frozen=True)
class ExportInputs:
    """What the stages before left."""

    adapter: Path
    """Folder with the adapter and its tokenizer."""

    examples: ExampleFiles

    training: TrainingRecord

    dataset_report: Path

    @property
    def dataset(self) -> DatasetReport:
        return DatasetReport.model_validate_json(self.dataset_report.read_bytes())


def fetch_inputs(config: PreparedRunConfig, output: Folder, workspace: Path) -> ExportInputs:
    """Bring what the stages before left to the folder `workspace`; StageError if it changed."""
    prints = config.resolved.fingerprints
    trained = open_stage(output, Stage.TRAIN, prints.train)
    prepared = open_stage(output, Stage.PREPARE, prints.prepare)
    return ExportInputs(
        adapter=trained.fetch_folder("adapter", workspace / "adapter"),
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


MEMORY_BYTES = 3 * GIB // 2
"""For all processes of an export, beside mapped files: 1.16 GB were measured with the gate, an
importance matrix and the adapter's file at 1.07 billion parameters; layers are streamed."""


def check_memory() -> None:
    """Raise StageError(OutOfMemory) when the pod has less than an export takes."""
    free = free_memory()
    if free < MEMORY_BYTES:
        raise StageError(
            Reason.OUT_OF_MEMORY,
            f"The export needs {binary(MEMORY_BYTES)} of memory, and there are {binary(free)}: set "
            f"spec.stages.export.resources.limits.memory to at least "
            f"{binary(MEMORY_BYTES, up=True)}.",
        )


def check_space(config: RunConfig, base: Path, workspace: Path) -> None:
    """Raise StageError(OutOfDisk) when merged model and GGUF files will not fit beside the base.

    `base` is the folder with the base model; where its widths can't be read, nothing is checked.
    """
    shape = Shape.of_model(base)
    if shape is None:
        return
    need = export_disk(shape, config.training.lora, config.export, 0)
    # Nothing here is downloaded any more, so that no slack is needed for it.
    need = replace(need, slack=0)
    limit = "set stages.export.resources.limits.ephemeral-storage (or the volume) to"
    check_disk(need, shutil.disk_usage(workspace).free, "The export", limit)
