"""An export from its inputs to its models: merged, as GGUF, and each GGUF file through the gate.

A file is published as soon as it is finished and checked, so that it can be uploaded while the next
one is computed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
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
    beyond_float16,
    write_adapter,
    write_files,
    write_parts,
)
from finetune_trainer.export.gguf.importance import write_importance
from finetune_trainer.export.merge import MergedWeights
from finetune_trainer.export.merge.deltas import is_whole_model
from finetune_trainer.export.merge.fp8 import write_fp8
from finetune_trainer.export.merge.model_folder import (
    assemble,
    generation_settings,
    write_merged,
)
from finetune_trainer.export.ollama import write_modelfile
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

T = TypeVar("T")

MERGED, MERGED_FP8, GGUF = "merged", "merged-fp8", "gguf"

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
    discard: Callable[[Path], object] = lambda _: None
    """Takes a file that nothing here reads any more."""

    part_bytes: int | None = None
    """A larger GGUF file is published in parts of this size; None: files stay whole."""

    @property
    def writes_merged(self) -> bool:
        """Whether the merged model is published; where it is what is converted, it is there."""
        return self.config.export.merged and self.model.files.adapter is not None

    @property
    def writes_weights(self) -> bool:
        """Whether its weights are written: GGUF files are made of them as well."""
        asked = self.config.export.merged or bool(self.config.export.gguf)
        return asked and self.model.files.adapter is not None


class CheckedFile(NamedTuple):
    """A GGUF file of the merged model with its verdict."""

    kind: Quantization
    file: Path
    verdict: FileVerdict
    served: Path
    """Itself, or its first part."""


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
    if context.config.export.merged_fp8:
        make_fp8(context)
    merged = make_merged(context) if context.writes_weights else None
    if not (context.config.export.merged or context.config.export.gguf):
        return GateReport()
    context.reporter.message("Asking the tuned model, for what its files are held against")
    source_gate = SourceGate.open(
        gate_inputs(context, merged if context.writes_merged else None), context.workspace / "gate"
    )
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
    full = context.config.training.method == "full"
    what = (
        "Copying the trained model in 16 bits"
        if full
        else "Merging the adapter into the base model"
    )
    moved = context.reporter.transfer(what, total)
    write_merged(model.weights, model.files.folder.path, moved)
    return model.files.folder


def make_fp8(context: ExportContext) -> None:
    """Write the merged model in FP8, and publish its folder."""
    weights, narrow = context.model.weights, context.result / MERGED_FP8
    moved = context.reporter.transfer("Writing FP8", sum(i.nbytes for i in weights.infos.values()))
    write_fp8(weights, context.model.files.folder.path, narrow, moved)
    publish_folder(context.add_file, narrow)
    for file in narrow.glob("*.safetensors"):
        context.discard(file)


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
        converted=partial(discard_merged, context),
    )
    with ThreadPoolExecutor(1, "adapter") as beside:  # each imports for seconds on one CPU
        adapter_made = beside.submit(make_adapter, context)
        kind, source_file = next(written)
        reporter.message(f"Checking {source_file.name}")
        gate = source_gate.check(source_file, kind)
        served = source_file
        if kind in config.export.gguf:
            served = publish_file(context, source_file, gate.source_verdict)
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
    source = CheckedFile(kind, source_file, gate.source_verdict, served)
    files = [source]
    files += check_derived(context, gate, written)
    samples = take_samples(context, gate, files, adapter)
    make_modelfile(context, files)
    derived = (each.verdict for each in files[1:])
    return gate.report([*adapter_verdicts, *derived], samples)


def discard_merged(context: ExportContext) -> None:
    """Let the merged weights leave this disk, unless they were the base model from the start."""
    model = context.model.files
    if model.folder.path != model.base.path:
        for file in model.folder.path.glob("*.safetensors"):
            context.discard(file)


def make_adapter(context: ExportContext) -> Path | None:
    """The adapter alone as GGUF; None if there is none, or llama.cpp can't apply it and the spec
    doesn't ask."""
    model = context.model.files
    if model.adapter is None or is_whole_model(model.adapter):
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
    kept: Path | None = None  # on which the Modelfile's template is tried
    for kind, file in written:
        context.reporter.message(f"Checking {file.name}")
        verdict = gate.check(file, kind)
        if kind is Quantization.F16 and (beyond := beyond_float16(file)):
            words = f"{beyond} has values that F16 can't hold (its largest is 65,504): take BF16"
            verdict = verdict.model_copy(update={"problems": (words, *verdict.problems)})
        served = publish_file(context, file, verdict)
        former, kept = (kept, file) if kept is None or verdict.passed else (file, kept)
        if former is not None:
            context.discard(former)
        yield CheckedFile(kind, file, verdict, served)


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


def publish_file(context: ExportContext, file: Path, verdict: FileVerdict) -> Path:
    """Publish a checked file among the good ones, or apart; returns what a server is told to load.

    That is the first part of a file that is too large to be published as one.
    """
    folder = REJECTED if rejects(context.config.export, verdict) else GGUF
    if context.part_bytes is None or file.stat().st_size <= context.part_bytes:
        context.add_file(file, f"{folder}/{file.name}", verdict.quality)
        return file
    first, *others = write_parts(file, context.part_bytes)
    context.add_file(first, f"{folder}/{first.name}", verdict.quality)
    for part in others:
        context.add_file(part, f"{folder}/{part.name}")
    for part in (first, *others):
        context.discard(part)
    return first


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
        {each.kind: each.served for each in good},
        next(each.file for each in reversed(good) if each.file.exists()),
        model.tokenizer,
        config,
        parameters=sum(math.prod(info.shape) for info in model.weights.infos.values()),
        generation=generation_settings(model.files.folder),
        plain_text=context.examples.plain_text,
    )
    context.add_file(file, file.name)


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
