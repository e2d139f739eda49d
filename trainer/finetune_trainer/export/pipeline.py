"""An export from its inputs to its models: merged, as GGUF, and each GGUF file through the gate.

A file is published as soon as it is finished and checked, so that it can be uploaded while the next
one is computed. What an earlier attempt has checked and uploaded is neither made nor checked again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from finetune_trainer.contract import (
    FileVerdict,
    GateReport,
    Quantization,
    Reason,
    Sample,
    StageError,
)
from finetune_trainer.contract.output import IMPORTANCE_TYPES
from finetune_trainer.export.gate import DerivedGate, SourceGate, expect, rejects
from finetune_trainer.export.gate.expected import Expected, GateInputs
from finetune_trainer.export.gate.kept import key_of
from finetune_trainer.export.gate.rows import read_examples
from finetune_trainer.export.gguf.files import (
    adapter_file_name,
    beyond_float16,
    derived_order,
    write_adapter,
    write_files,
)
from finetune_trainer.export.gguf.importance import write_importance
from finetune_trainer.export.inputs import (
    GGUF,
    MERGED,
    MERGED_FP8,
    CheckedFile,
    ExportContext,
    fetch,
    gguf_path,
    publish_file,
    publish_folder,
    publish_merged,
    some_file,
)
from finetune_trainer.export.merge.deltas import is_whole_model
from finetune_trainer.export.merge.model_folder import (
    fp8_problem,
    generation_settings,
    write_fp8,
    write_merged,
)
from finetune_trainer.export.ollama import write_modelfile
from finetune_trainer.memory.forecast import SOURCE
from finetune_trainer.model import ModelFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Missing:
    """What of an export's GGUF files earlier attempts have left to do."""

    kinds: tuple[Quantization, ...]
    """Types that have to be made."""

    source: bool
    """Whether the file that they are made of is needed."""

    merged: bool
    """Whether the merged weights are needed for that."""

    @classmethod
    def of(cls, context: ExportContext) -> Missing:
        asked, own = context.config.export.gguf, context.model.files.own_type
        there = {kind for kind in {own, *asked} if context.standing(gguf_path(context, kind))}
        kinds = tuple(kind for kind in asked if kind not in there)
        # Samples are what is kept last.
        done = context.kept.samples is not None and context.kept.file(gguf_path(context, own))
        source = bool(asked) and (bool(kinds) or not done)
        narrow = Quantization.F16 in kinds and own is not Quantization.F16
        return cls(kinds, source, (source and own not in there) or narrow)

    def skipped(self, context: ExportContext) -> Iterator[str]:
        """Parts of the work that needn't be done: all that earlier attempts did, and types that
        are the source file."""
        export, own = context.config.export, context.model.files.own_type
        merged = self.merged or (context.writes_merged and not context.standing_folder(MERGED))
        needed = {"merge"} if merged else set()
        needed |= {"reference"} if context.kept.reference is None else set()
        needed |= {
            f"{do} {kind}" for do in ("write", "check") for kind in self.kinds if kind != own
        }
        needed |= {f"{do} {SOURCE}" for do in ("write", "check")} if self.source else set()
        needed |= {"check adapter"} if self.source else set()
        needed |= {"importance"} if set(self.kinds) & set(IMPORTANCE_TYPES) else set()
        needed |= {"samples"} if export.gguf and context.kept.samples is None else set()
        return (name for name in context.reporter.parts if name not in {*needed, "upload"})


def make_models(context: ExportContext) -> GateReport:
    """Write the merged model and GGUF files with their Modelfile, and check each.

    Raises StageError.
    """
    if not (context.config.export.merged or context.config.export.gguf):
        make_fp8(context)
        return GateReport()
    merged = context.model.files.folder if context.writes_merged else None
    expected = expect(gate_inputs(context, merged), context.workspace / "gate")
    context.kept.expect(key_of(expected.rows, context.config.export))
    if context.config.export.merged_fp8:
        make_fp8(context)
    there = context.standing_folder(MERGED)
    missing = Missing.of(context)
    if context.writes_weights and (missing.merged or (context.writes_merged and not there)):
        make_merged(context)
    context.reporter.skip(missing.skipped(context))
    if context.kept.reference is None:
        context.reporter.message("Asking the tuned model, for what its files are held against")
    with context.reporter.part("reference"):
        source_gate = SourceGate.ask(expected, context.kept)
    verdict = source_gate.check_merged(context.model.files.own_type)
    if verdict:
        publish_merged(context, verdict, there)
    found = make_gguf(context, source_gate, missing) if context.config.export.gguf else None
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


def make_merged(context: ExportContext) -> None:
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
    with context.reporter.part("merge"):
        moved = context.reporter.transfer(what, total)
        write_merged(model.weights, model.files.folder.path, moved)


def make_fp8(context: ExportContext) -> None:
    """Write the merged model in FP8, read it back against the merged one, and publish its folder.

    Raises StageError(QualityGateFailed), unless export.verify is off.
    """
    if there := context.standing_folder(MERGED_FP8):
        for artifact in there:
            context.take(artifact)
        return
    weights, narrow = context.model.weights, context.result / MERGED_FP8
    with context.reporter.part("fp8"):
        total = sum(info.nbytes for info in weights.infos.values())
        moved = context.reporter.transfer("Writing FP8", total)
        write_fp8(weights, context.model.files.folder.path, narrow, moved)
        verifies = context.config.export.verify != "off"
        if verifies and (problem := fp8_problem(weights, narrow)):
            raise StageError(
                Reason.QUALITY_GATE_FAILED,
                f"{MERGED_FP8}/: {problem}. Nothing of it is published: start the export again.",
            )
    context.kept.add_folder(MERGED_FP8, publish_folder(context.add_file, narrow))
    for file in narrow.glob("*.safetensors"):
        context.discard(file)


def make_gguf(context: ExportContext, source_gate: SourceGate, missing: Missing) -> GateReport:
    """Write GGUF files and Modelfile below the result, and check each; raises StageError."""
    config, model, reporter = context.config, context.model.files, context.reporter
    importance = None
    if config.export.importance_matrix and set(missing.kinds) & set(IMPORTANCE_TYPES):
        importance = context.workspace / "importance.gguf"
    written = write_files(
        model,
        context.result / GGUF,
        missing.kinds,
        source=local_source(context, missing),
        importance=importance,
        reporter=reporter,
        converted=partial(discard_merged, context),
    )
    with ThreadPoolExecutor(1, "adapter") as beside:  # each imports for seconds on one CPU
        adapter_made = beside.submit(make_adapter, context)
        gate = check_source(context, source_gate, written, missing)
        adapter = adapter_made.result()
    asked = adapter if config.export.adapter_gguf is not False else None
    adapter_verdicts = [check_adapter(context, gate, asked)] if asked else []
    if importance and not context.kept.bring(importance):
        rows = read_examples(context.examples.trained)
        with reporter.part("importance"):
            write_importance(model, gate.source, rows, importance, reporter)
        context.kept.add_beside(importance)
    files = [CheckedFile(model.own_type, gate.source, gate.source_verdict)]
    files += check_derived(context, gate, written)
    samples = take_samples(context, gate, files, adapter)
    make_modelfile(context, files)
    derived = (each.verdict for each in files[1:])
    return gate.report([*adapter_verdicts, *derived], samples)


@contextmanager
def checking(context: ExportContext, file: Path, what: str) -> Iterator[None]:
    """Say that a file is checked, and count it in the work."""
    context.reporter.message(f"Checking {file.name}")
    with context.reporter.part(f"check {what}"):
        yield


def local_source(context: ExportContext, missing: Missing) -> Path | None:
    """The file that others are made of, where an earlier attempt has uploaded it."""
    there = context.standing(gguf_path(context, context.model.files.own_type))
    return fetch(context, there.artifact) if there and missing.source else None


def check_source(
    context: ExportContext,
    source_gate: SourceGate,
    written: Iterator[tuple[Quantization, Path]],
    missing: Missing,
) -> DerivedGate:
    """Check and publish the file that all others are made of."""
    kind, expected = context.model.files.own_type, source_gate.expected
    path, asked = gguf_path(context, kind), kind in context.config.export.gguf
    file = context.result / path
    there = context.standing(path) if asked else None
    if missing.source:
        _, file = next(written)
        known = there or context.kept.of(path, file)
    else:
        known = context.kept.file(path)
    if known and known.verdict and (not missing.source or bring_logprobs(context, expected)):
        gate = DerivedGate(expected, file, known.verdict, known.alike)
    else:
        with checking(context, file, SOURCE):
            gate = source_gate.check(file, kind)
        context.kept.add_beside(expected.source_logprobs)
    if there:
        context.take(there.artifact)
    elif missing.source:
        publish_file(context, file, gate.source_verdict, path, gate.alike, asked=asked)
    return gate


def bring_logprobs(context: ExportContext, expected: Expected) -> bool:
    """Whether what other files are compared with is here."""
    return expected.reference is None or context.kept.bring(expected.source_logprobs)


def check_adapter(context: ExportContext, gate: DerivedGate, file: Path) -> FileVerdict:
    """Check the adapter's own file, and publish it."""
    path = f"{GGUF}/{file.name}"
    known = context.kept.of(path, file) if gate.source.exists() else context.kept.file(path)
    if known and known.verdict:
        verdict = known.verdict
    else:
        with checking(context, file, "adapter"):
            verdict = gate.check_adapter(file)
    publish_file(context, file, verdict, path)
    return verdict


def discard_merged(context: ExportContext) -> None:
    """Let the merged weights leave this disk, unless they were the base model from the start."""
    model = context.model.files
    if model.folder.path != model.base.path:
        for file in model.folder.path.glob("*.safetensors"):
            context.discard(file)


def make_adapter(context: ExportContext) -> Path | None:
    """The adapter alone as GGUF, which also lets llama.cpp answer as the base model; None if there
    is none, or llama.cpp can't apply it and the spec doesn't ask."""
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
    tried_on: Path | None = None  # for the Modelfile's template
    asked, own = context.config.export.gguf, context.model.files.own_type
    for kind in derived_order({*asked} - {own}):
        path = gguf_path(context, kind)
        there = context.standing(path)
        if there and there.verdict:
            context.take(there.artifact)
            yield CheckedFile(kind, context.result / path, there.verdict)
            continue
        _, file = next(written)
        known = context.kept.of(path, file)
        verdict = known.verdict if known and known.verdict else check_one(context, gate, file, kind)
        publish_file(context, file, verdict, path)
        newer = tried_on is None or verdict.passed
        former, tried_on = (tried_on, file) if newer else (file, tried_on)
        if former is not None:
            context.discard(former)
        yield CheckedFile(kind, file, verdict)


def check_one(
    context: ExportContext, gate: DerivedGate, file: Path, kind: Quantization
) -> FileVerdict:
    """Look at a file that was made of the source file, or of the merged model."""
    with checking(context, file, kind):
        verdict = gate.check(file, kind)
    if kind is Quantization.F16 and (beyond := beyond_float16(file)):
        words = f"{beyond} has values that F16 can't hold (its largest is 65,504): take BF16"
        verdict = verdict.model_copy(update={"problems": (words, *verdict.problems)})
    return verdict


def take_samples(
    context: ExportContext, gate: DerivedGate, files: list[CheckedFile], adapter: Path | None
) -> tuple[Sample, ...]:
    """Answers of the smallest file that passed and is still there, which is the fastest."""
    if context.kept.samples is not None:
        return context.kept.samples
    passed = [each for each in files if each.verdict.passed]
    if not passed:
        return ()
    smallest = some_file(context, passed)
    context.reporter.message(f"Asking {smallest.name} and the base model the same questions")
    with context.reporter.part("samples"):
        samples = gate.samples(smallest, adapter)
    context.kept.add_samples(samples)
    return samples


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
        {each.kind: context.first_parts.get(each.file, each.file) for each in good},
        some_file(context, good),
        model.tokenizer,
        config,
        parameters=sum(math.prod(info.shape) for info in model.weights.infos.values()),
        generation=generation_settings(model.files.folder),
        plain_text=context.examples.plain_text,
    )
    context.add_file(file, file.name)
