"""prepare: the cheap checks first, so that a mistake shows within seconds; then the examples.

configuration -> dataset there, output writable -> base model's files -> fingerprint of `prepare`
  -> unless the store holds its examples: every row read -> tokenizer and chat template -> the model
  has the layers that get an adapter, and llama.cpp can convert it -> examples.jsonl, eval.jsonl,
  dataset-report.json, complete.json
-> fingerprints of `train` and `export`, which go by those examples -> what the store already holds
-> a plan for the training that fits its hardware
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from uuid import uuid4

import numpy as np

from finetune_trainer.contract import (
    Hardware,
    Needs,
    Reason,
    Resolved,
    RunConfig,
    Stage,
    StageError,
    StageResult,
    TrainingPlan,
)
from finetune_trainer.contract.output import written_models
from finetune_trainer.memory.forecast import (
    check_disk,
    downloaded,
    export_disk,
    export_memory,
    training_disk,
)
from finetune_trainer.memory.plan import Lengths, describe, plan, training_memory
from finetune_trainer.model import ModelFolder, base_model, prequantized
from finetune_trainer.model.base_model import BaseModelFiles
from finetune_trainer.model.shape import Shape
from finetune_trainer.prepare.dataset_files import DataFiles, DatasetRows, find_data_files, hold_out
from finetune_trainer.prepare.findings import Findings, Prepared
from finetune_trainer.prepare.reading.encoding import check_encoding
from finetune_trainer.prepare.reading.layout import check_columns
from finetune_trainer.prepare.stored import (
    CompleteStages,
    StoredRun,
    contents_of,
    images_of,
    metrics_of,
    read_prepared,
    roll_back,
    stored_run,
)
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import Folder, open_folder
from finetune_trainer.store.marker import (
    DATASET_REPORT,
    SUMMARY,
    Marker,
    claim,
    save_stage,
    stage_folder,
)
from finetune_trainer.store.versions import make_current_and_prune, summarize_versions

ROWS_READ_BY_LLAMA_CPP = 16  # before the training; the export compares held-out rows as well
ATTEMPTS = 3  # to read one version of a file that somebody is writing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepareInputs:
    """One version of everything that goes in, and what the store already holds for it."""

    files: DataFiles
    model: BaseModelFiles
    stored: StoredRun
    prepared: Marker | None
    """The examples, where the store holds them already."""


def run(config: RunConfig, workdir: Path, reporter: Reporter) -> StageResult:
    """Check the inputs and leave the examples in the store; raises StageError."""
    reporter.begin(Stage.PREPARE, "Checking access to dataset and output")
    check_config(config)
    output = open_folder(config.output.folder, config.storage)
    claim(output, config.output, config.job)
    if config.rollback_to:
        return roll_back(output, config.rollback_to, reporter)
    find_data_files(config.dataset, config.dataset_storage)
    check_writable(output)
    inputs = fetch_inputs(config, output, workdir, reporter)
    base: ModelFolder | None = None
    marker = inputs.prepared
    if marker is None:
        base, marker = write_prepared(config, inputs, output, workdir, reporter)
    prepared = read_prepared(output, marker)
    check_held_out(config, prepared.dataset.eval_examples)
    prints, complete = inputs.stored.find_later(marker, prepared)
    if inputs.prepared:
        complete = {Stage.PREPARE: marker, **complete}
    if base is None and Stage.EXPORT not in complete:
        from finetune_trainer.prepare.checks import check_model  # noqa: PLC0415 - see encode_rows

        base = fetch_model(config, inputs.model, workdir, reporter)
        check_model(config, inputs.model, base, workdir, reporter)
    training_plan = None
    if base and not {Stage.TRAIN, Stage.EXPORT}.intersection(complete):
        training_plan = plan_training(config, inputs.model, base, prepared.tokens.max)
    resolved = Resolved(
        fingerprints=prints,
        dataset_etag=inputs.files.rows.info.etag,
        dataset_rows=prepared.dataset.examples,
        eval_rows=prepared.dataset.eval_examples,
        plan=training_plan,
        needs=predict_needs(config, inputs.model, base, prepared.tokens.max, training_plan),
        model_revision=inputs.model.revision,
        model_commit=inputs.model.commit,
        init_revision=inputs.stored.init_revision,
        examples=contents_of(marker, prepared).short_digest,
    )
    exported = (
        make_current_and_prune(output, config.output, prints) if Stage.EXPORT in complete else None
    )
    return StageResult(
        stage=Stage.PREPARE,
        reason=Reason.SUCCEEDED,
        message=summary_line(prepared, complete),
        resolved=resolved,
        complete=tuple(complete),
        artifacts=exported.marker.files if exported else (),
        version=exported.name or None if exported else None,
        manifest_uri=output.uri_of(exported.manifest_path) if exported else None,
        images=images_of(output, exported) if exported else (),
        versions=summarize_versions(output),
        metrics=metrics_of(output, complete),
        dataset=prepared.dataset,
    )


def check_config(config: RunConfig) -> None:
    """Raise StageError(InvalidConfig) for fields that contradict each other."""
    dataset = config.dataset
    check_columns(dataset.columns)
    check_encoding(dataset.encoding)
    if dataset.eval_source == dataset.source:
        raise StageError(
            Reason.INVALID_CONFIG,
            "spec.dataset.evalSource is the dataset itself, so nothing would be held out: name "
            "another file, or leave it out to hold evalFraction of the rows out.",
        )
    if config.training.lora.use_dora and config.export.adapter_gguf:
        raise StageError(
            Reason.INVALID_CONFIG,
            "spec.export.adapterGguf: llama.cpp can't apply a DoRA adapter. Leave adapterGguf out "
            "(the merged files are as usual), or leave out training.lora.useDora.",
        )
    _check_images(config)
    if config.training.lora.modules_to_save:
        _check_alone(config, "modulesToSave")
    if config.training.lora.target_parameters:
        _check_alone(config, "targetParameters")
    if config.training.method == "full":
        _check_full(config)


def _check_images(config: RunConfig) -> None:
    """Raise StageError(InvalidConfig) for images of models that the export doesn't write."""
    oci, export = config.output.oci, config.export
    if oci is None:
        return
    adapter = () if config.training.method == "full" else ("adapter",)
    written = (*written_models(export), *adapter)
    if strange := [name for name in oci.contents(export) if name not in written]:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"spec.output.oci.include names {', '.join(strange)}, which spec.export doesn't "
            f"write: it writes {', '.join(written)}.",
        )


def _check_full(config: RunConfig) -> None:
    """Raise StageError(InvalidConfig) for what full fine-tuning can't do."""
    if config.export.adapter_gguf:
        raise StageError(
            Reason.INVALID_CONFIG,
            "spec.export.adapterGguf: training.method full trains the model itself, and no "
            "adapter. Leave adapterGguf out, or set training.method to lora.",
        )
    if not (config.export.merged or config.export.gguf):
        raise StageError(
            Reason.INVALID_CONFIG,
            "spec.export: training.method full leaves no adapter, so nothing would be published. "
            "Leave export.merged at true, or name types in export.gguf.",
        )
    if config.model.trust_remote_code:
        raise StageError(
            Reason.INVALID_CONFIG,
            "spec.training.method: full is not supported for a model that brings its own code "
            "(model.trustRemoteCode). Set training.method to lora.",
        )


def _check_alone(config: RunConfig, name: str) -> None:
    """Raise StageError(InvalidConfig) for what can't be done with this field of the adapter."""
    field = f"spec.training.lora.{name}"
    if config.export.adapter_gguf:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"spec.export.adapterGguf: llama.cpp can't apply an adapter with {field}. Leave "
            f"adapterGguf out (the merged files are as usual), or leave out {name}.",
        )
    if config.training.parallelism == "fsdp":
        raise StageError(
            Reason.INVALID_CONFIG,
            f"spec.training.parallelism: fsdp can't spread a model with {field}. Set it to ddp, or "
            f"leave out {name}.",
        )
    if name == "targetParameters" and config.training.method == "qlora":
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{field}: experts that are held together stay in 16 bits with qlora, and are not "
            f"adapted there. Set spec.training.method to lora, or leave out {name}.",
        )


def check_held_out(config: RunConfig, rows: int) -> None:
    """Raise StageError(InvalidConfig) when early stopping has no held-out rows to look at."""
    if config.training.early_stopping and not rows:
        raise StageError(
            Reason.INVALID_CONFIG,
            "spec.training.earlyStopping needs held-out rows, and there are none: give "
            "spec.dataset.evalSource, raise dataset.evalFraction (20 rows or more are needed), or "
            "leave out earlyStopping.",
        )


def check_writable(output: Folder) -> None:
    """Write a probe and delete it again, so that no run ends with nowhere to go."""
    probe = f"stages/.write-check-{uuid4().hex[:12]}"
    output.write(probe, b"finetune-trainer checks that it can write here\n")
    output.delete([probe])


def fetch_inputs(
    config: RunConfig, output: Folder, workdir: Path, reporter: Reporter
) -> PrepareInputs:
    """Look for the examples, and bring the dataset to disk unless they are there."""
    model = base_model.find(config.model, config.model_storage)
    for _ in range(ATTEMPTS):
        files = find_data_files(config.dataset, config.dataset_storage)
        stored = stored_run(config, output, files, model)
        prepared = stored.find_prepared()
        unchanged = prepared is not None or (
            files.rows.fetch(workdir / "dataset", reporter)
            and (not files.held_out or files.held_out.fetch(workdir / "evaluation", reporter))
        )
        if unchanged:
            return PrepareInputs(files, model, stored, prepared)
    raise StageError(
        Reason.DATASET_UNREADABLE,
        f"{config.dataset.source} or spec.dataset.evalSource changes while it is read: apply the "
        "job when it is complete.",
    )


def write_prepared(
    config: RunConfig, inputs: PrepareInputs, output: Folder, workdir: Path, reporter: Reporter
) -> tuple[ModelFolder, Marker]:
    """Read the rows and leave the examples in the store; returns the base model's folder as well.

    When rows make it fail, the error carries what is known, and the store gets the report.
    """
    files, folder = inputs.files, workdir / "prepared"
    findings = Findings(config, DatasetRows(files.rows, workdir / "dataset"))
    if files.held_out:
        findings.eval_rows = DatasetRows(files.held_out, workdir / "evaluation")
    folder.mkdir()
    try:
        reporter.message(f"Reading {files.rows.uri}")
        for rows in findings.all_rows():
            rows.load(config.dataset, config.training.seed, config.training.objective)
        base = fetch_model(config, inputs.model, workdir, reporter)
        encode_rows(findings, inputs.model, base, workdir, reporter)
    except StageError as error:
        if error.reason not in (Reason.INVALID_ROWS, Reason.EXAMPLES_TOO_LONG):
            raise
        findings.write(folder)
        report = f"{stage_folder(Stage.PREPARE, inputs.stored.fingerprint)}/{DATASET_REPORT}"
        output.upload(folder / DATASET_REPORT, report)
        message = f"{error.message} {output.uri_of(report)} lists all rows concerned."
        summary = findings.summary() if findings.rows.total else error.dataset
        raise StageError(error.reason, message, dataset=summary) from error
    findings.write(folder)
    written = findings.prepared().model_dump_json(indent=2, exclude_none=True)
    (folder / SUMMARY).write_text(written, encoding="utf-8")
    return base, save_stage(output, Stage.PREPARE, inputs.stored.fingerprint, folder)


def encode_rows(
    findings: Findings,
    model: BaseModelFiles,
    base: ModelFolder,
    workdir: Path,
    reporter: Reporter,
) -> None:
    """Apply the chat template and the tokenizer, and write the examples to `workdir`/prepared."""
    # Importing transformers takes seconds. No mistake that is found before this needs it.
    from finetune_trainer.model.token_rows import tokens_of  # noqa: PLC0415
    from finetune_trainer.model.tokenizer import load_tokenizer  # noqa: PLC0415
    from finetune_trainer.prepare.checks import (  # noqa: PLC0415
        check_model,
        check_template,
        check_vocabulary,
        describe_template,
    )
    from finetune_trainer.prepare.examples import check_lengths, write_examples  # noqa: PLC0415

    config, rows, eval_rows = findings.config, findings.rows, findings.eval_rows
    tokenizer = load_tokenizer(base)
    check_vocabulary(tokenizer, base)
    check_template(tokenizer, system=any(each.has_system for each in findings.all_rows()))
    findings.template = describe_template(tokenizer)
    names = (f"row {rows.name_of(number)}" for number in rows.numbers.tolist())
    first = dict(islice(zip(names, rows.examples(), strict=True), ROWS_READ_BY_LLAMA_CPP))
    findings.notice = check_model(config, model, base, workdir, reporter, rows=first)
    if findings.notice:
        log.warning("%s", findings.notice)

    reporter.message(f"Applying the chat template to {rows.total} rows")
    training, folder = config.training, workdir / "prepared"
    of = tokens_of(tokenizer, training.objective, training.max_sequence_length)
    held = hold_out(rows.hashes, config.dataset.eval_fraction if config.dataset.splits else 0)
    findings.examples = write_examples(rows, held, tokenizer, of, folder)
    check_lengths(findings.examples, config.dataset)
    if eval_rows:
        all_held = np.ones(len(eval_rows.numbers), dtype=np.bool_)
        findings.eval_examples = write_examples(eval_rows, all_held, tokenizer, of, folder)
        check_lengths(findings.eval_examples, config.dataset)


def fetch_model(
    config: RunConfig, model: BaseModelFiles, workdir: Path, reporter: Reporter
) -> ModelFolder:
    """Fetch what is small of the base model; returns the folder that it is in."""
    return base_model.fetch(
        model, config.model_storage, workdir / "tokenizer", reporter, weights=False
    )


def plan_training(
    config: RunConfig, model: BaseModelFiles, base: ModelFolder, longest: int
) -> TrainingPlan | None:
    """How to split a step; None where nothing is known of the hardware or of the model's widths.

    `base` has the model's config.json; `longest` is the tokens of the longest example, as it is
    trained on. Raises StageError: OutOfGPUMemory, OutOfMemory, OutOfDisk, InvalidConfig.
    """
    hardware = config.hardware
    if hardware is None:
        return None
    shape = Shape.of_model(base.path)
    if shape is None:
        log.warning(
            "The widths of %s can't be read from its config.json, so its memory is not predicted",
            config.model.source,
        )
        return None
    check_disks(config, shape, model_on_disk(config, model, base, shape), hardware)
    training_plan = plan(config.training, shape, Lengths(longest), hardware)
    log.info("Plan: %s", describe(training_plan, hardware))
    return training_plan


def model_on_disk(config: RunConfig, model: BaseModelFiles, base: ModelFolder, shape: Shape) -> int:
    """Bytes of the base model on the disk of a later stage's pod."""
    cached = base_model.stays_in_cache(model)
    size = 0 if cached else downloaded(config.model.source, model.sizes)
    if prequantized.is_widened(base.path):
        size += 2 * shape.parameters  # it is there in 16 bits as well
    return size


def predict_needs(
    config: RunConfig,
    model: BaseModelFiles,
    base: ModelFolder | None,
    longest: int,
    made: TrainingPlan | None,
) -> Needs | None:
    """What the pods of the later stages should take; None where nothing can be told."""
    shape = Shape.of_model(base.path) if base is not None else None
    if base is None or shape is None or config.hardware is None:
        return None
    training, export, gpus = config.training, config.export, config.hardware.gpus
    size, lengths = model_on_disk(config, model, base, shape), Lengths(longest)
    return Needs(
        train_memory_bytes=made and training_memory(training, shape, lengths, gpus, made),
        train_storage_bytes=training_disk(shape, training, size).total if made else None,
        export_memory_bytes=export_memory(shape, export),
        export_storage_bytes=export_disk(shape, training, export, size).total,
    )


def check_disks(config: RunConfig, shape: Shape, model_bytes: int, hardware: Hardware) -> None:
    """Raise StageError(OutOfDisk) where the pod of a later stage would run out of disk."""
    limit = "set stages.{}.resources.limits.ephemeral-storage to"
    if hardware.ephemeral_storage_bytes is not None:
        need = training_disk(shape, config.training, model_bytes)
        check_disk(need, hardware.ephemeral_storage_bytes, "The training", limit.format("train"))
    if hardware.export_storage_bytes is not None:
        need = export_disk(shape, config.training, config.export, model_bytes)
        check_disk(need, hardware.export_storage_bytes, "The export", limit.format("export"))


def summary_line(prepared: Prepared, complete: CompleteStages) -> str:
    found = prepared.dataset
    parts = [f"{found.examples} examples ({found.tokens:,} tokens)"]
    if found.eval_examples:
        parts.append(f"{found.eval_examples} held out")
    if prepared.shared:
        parts.append(f"{prepared.shared} of them are trained on as well")
    if found.invalid:
        parts.append(f"{found.invalid} bad rows skipped")
    if found.duplicates:
        parts.append(f"{found.duplicates} rows repeat another")
    if prepared.split_into:
        parts.append(
            f"{found.truncated} texts beyond the maximum length are split into "
            f"{prepared.split_into} rows, so that nothing is lost"
        )
    elif cut := found.truncated - prepared.left_out:
        parts.append(f"{cut} cut off at the maximum length")
    if prepared.left_out:
        parts.append(f"{prepared.left_out} rows left out: no answer within the maximum length")
    if complete:
        parts.append(f"already there: {', '.join(complete)}")
    line = "; ".join(parts)
    return f"{line}. {prepared.notice}" if prepared.notice else line
