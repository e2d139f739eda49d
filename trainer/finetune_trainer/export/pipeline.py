"""An export from its inputs to its models: merged, as GGUF, and each GGUF file through the gate.

A file is published as soon as it is finished and checked, so that it can be uploaded while the next
one is computed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from finetune_trainer.contract import (
    REJECTED,
    Artifact,
    FileVerdict,
    GateReport,
)
from finetune_trainer.export.gate import SourceGate, expect, rejects
from finetune_trainer.export.gate.expected import GateInputs
from finetune_trainer.export.gate.kept import key_of
from finetune_trainer.export.gguf_pipeline import Missing, make_gguf
from finetune_trainer.export.inputs import ExportContext, files_below, publish_folder
from finetune_trainer.export.merge.model_folder import write_fp8, write_merged
from finetune_trainer.model import ModelFolder

MERGED, MERGED_FP8, GGUF = "merged", "merged-fp8", "gguf"

log = logging.getLogger(__name__)


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
    with context.reporter.part("merge"):
        moved = context.reporter.transfer(what, total)
        write_merged(model.weights, model.files.folder.path, moved)
    return model.files.folder


def make_fp8(context: ExportContext) -> None:
    """Write the merged model in FP8, and publish its folder."""
    if there := context.standing_folder(MERGED_FP8):
        for artifact in there:
            context.take(artifact)
        return
    weights, narrow = context.model.weights, context.result / MERGED_FP8
    with context.reporter.part("fp8"):
        total = sum(info.nbytes for info in weights.infos.values())
        moved = context.reporter.transfer("Writing FP8", total)
        write_fp8(weights, context.model.files.folder.path, narrow, moved)
    context.kept.add_folder(MERGED_FP8, publish_folder(context.add_file, narrow))
    for file in narrow.glob("*.safetensors"):
        context.discard(file)


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
