"""prepare: the cheap checks first, so that a mistake shows within seconds; then the examples.

configuration -> dataset there, output writable -> base model's files -> fingerprints -> what the
  store already holds -> every row read -> tokenizer and chat template -> the model has the layers
  that get an adapter, and llama.cpp can convert it -> examples.jsonl, eval.jsonl,
  dataset-report.json, complete.json -> a plan for the training that fits its hardware
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import numpy as np

from finetune_trainer.contract import (
    Fingerprints,
    Message,
    Reason,
    Resolved,
    RunConfig,
    Stage,
    StageError,
    StageResult,
    fingerprints,
)
from finetune_trainer.model import source
from finetune_trainer.prepare.checks import plan_training
from finetune_trainer.prepare.reading.layout import check_columns
from finetune_trainer.prepare.report import SUMMARY, Findings, Prepared
from finetune_trainer.prepare.rows import DataFiles, Rows, find
from finetune_trainer.prepare.split import Mask, hold_out
from finetune_trainer.runtime.progress import Reporter
from finetune_trainer.store import Folder, open_folder
from finetune_trainer.store.marker import (
    DATASET_REPORT,
    MANIFEST,
    Marker,
    find_complete,
    find_pushed,
    save_stage,
    stage_folder,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_READ_BY_LLAMA_CPP = 16  # before the training; the export compares held-out rows as well
ATTEMPTS = 3  # to read one version of a file that somebody is writing

log = logging.getLogger(__name__)

Held = dict[Stage, Marker]
"""Stages whose result for their fingerprint the store holds."""


@dataclass(frozen=True)
class Inputs:
    """One version of everything that goes in, and what the store already holds for it."""

    files: DataFiles
    model: source.ModelFiles
    prints: Fingerprints
    held: Held


def run(config: RunConfig, workspace: Path, reporter: Reporter) -> StageResult:
    """Check the inputs and leave the examples in the store; raises StageError."""
    reporter.begin(Stage.PREPARE, "Checking access to dataset and output")
    check_config(config)
    output = open_folder(config.output.uri, config.storage)
    find(config)
    check_writable(output)
    inputs = fetch_inputs(config, output, workspace, reporter)
    prints, held = inputs.prints, inputs.held
    base: Path | None = None
    if Stage.PREPARE not in held:
        base = prepare(config, inputs, output, workspace, reporter)
    elif Stage.EXPORT not in held:
        base = fetch_model(config, inputs.model, workspace, reporter)
        check_model(config, inputs.model, base, workspace, reporter)
    prepared = read_summary(output, prints.prepare)
    check_held_out(config, prepared.dataset.eval_examples)
    plan = None
    if base and not {Stage.TRAIN, Stage.EXPORT}.intersection(held):
        plan = plan_training(config, inputs.model, base, prepared.tokens.max)
    resolved = Resolved(
        fingerprints=prints,
        dataset_etag=inputs.files.rows.etag,
        dataset_rows=prepared.dataset.examples,
        eval_rows=prepared.dataset.eval_examples,
        plan=plan,
        model_revision=inputs.model.revision,
    )
    return StageResult(
        stage=Stage.PREPARE,
        reason=Reason.SUCCEEDED,
        message=describe(prepared, held),
        resolved=resolved,
        complete=tuple(held),
        artifacts=held[Stage.EXPORT].files if Stage.EXPORT in held else (),
        manifest_uri=output.uri_of(MANIFEST) if Stage.EXPORT in held else None,
        dataset=prepared.dataset,
    )


def check_config(config: RunConfig) -> None:
    """What no single field can say about itself."""
    dataset = config.dataset
    check_columns(dataset.columns)
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


def check_held_out(config: RunConfig, rows: int) -> None:
    """Early stopping looks at held-out rows."""
    if config.training.early_stopping and not rows:
        raise StageError(
            Reason.INVALID_CONFIG,
            "spec.training.earlyStopping needs held-out rows, and there are none: give "
            "spec.dataset.evalSource, raise dataset.evalFraction (20 rows or more are needed), or "
            "leave out earlyStopping.",
        )


def check_writable(output: Folder) -> None:
    """Write a probe and delete it again, so that a run does not end with nowhere to go."""
    probe = f"stages/.write-check-{uuid4().hex[:12]}"
    output.write(probe, b"finetune-trainer checks that it can write here\n")
    output.delete([probe])


def fetch_inputs(config: RunConfig, output: Folder, workspace: Path, reporter: Reporter) -> Inputs:
    """Work out the fingerprints, and bring the dataset to disk unless its examples are there."""
    model = source.find(config.model, config.storage)
    for _ in range(ATTEMPTS):
        files = find(config)
        prints = fingerprints(config, files.rows.etag, model.revision, files.eval_etag)
        inputs = Inputs(files, model, prints, held_stages(config, output, prints))
        if Stage.PREPARE in inputs.held or _fetch(files, workspace, reporter):
            return inputs
    raise StageError(
        Reason.DATASET_UNREADABLE,
        f"{config.dataset.source} or spec.dataset.evalSource changes while it is read: apply the "
        "job when it is complete.",
    )


def _fetch(files: DataFiles, workspace: Path, reporter: Reporter) -> bool:
    unchanged = files.rows.fetch(workspace / "dataset", reporter)
    if unchanged and files.held_out:
        unchanged = files.held_out.fetch(workspace / "evaluation", reporter)
    return unchanged


def held_stages(config: RunConfig, output: Folder, prints: Fingerprints) -> Held:
    """The stages that need not run again."""
    markers = {stage: find_complete(output, stage, getattr(prints, stage)) for stage in Stage}
    held = {stage: marker for stage, marker in markers.items() if marker}
    hub = config.output.hub
    if hub and Stage.EXPORT in held and not find_pushed(output, hub):
        # The export only pushes: it needs nothing of the training, whether or not that is there.
        held[Stage.TRAIN] = held.pop(Stage.EXPORT)
    return held


def prepare(
    config: RunConfig, inputs: Inputs, output: Folder, workspace: Path, reporter: Reporter
) -> Path:
    """Read the rows and leave the examples in the store; returns the base model's folder.

    When rows make it fail, the error carries what is known, and the store gets the report.
    """
    files, folder = inputs.files, workspace / "prepared"
    findings = Findings(config, Rows(files.rows, workspace / "dataset"))
    if files.held_out:
        findings.eval_rows = Rows(files.held_out, workspace / "evaluation")
    folder.mkdir()
    try:
        reporter.message(f"Reading {files.rows.uri}")
        for rows in findings.all_rows():
            rows.load(config.dataset, config.training.seed)
        base = fetch_model(config, inputs.model, workspace, reporter)
        tokenizer = open_tokenizer(findings, base)
        first = islice(findings.rows.messages(), ROWS_READ_BY_LLAMA_CPP)
        check_model(config, inputs.model, base, workspace, reporter, rows=first)
        reporter.message(f"Applying the chat template to {findings.rows.total} rows")
        encode(findings, tokenizer, folder)
    except StageError as error:
        if error.reason not in (Reason.INVALID_ROWS, Reason.EXAMPLES_TOO_LONG):
            raise
        findings.write(folder)
        report = f"{stage_folder(Stage.PREPARE, inputs.prints.prepare)}/{DATASET_REPORT}"
        output.upload(folder / DATASET_REPORT, report)
        message = f"{error.message} {output.uri_of(report)} lists all rows concerned."
        summary = findings.summary() if findings.rows.total else error.dataset
        raise StageError(error.reason, message, dataset=summary) from error
    findings.write(folder)
    (folder / SUMMARY).write_text(findings.prepared().model_dump_json(indent=2), encoding="utf-8")
    save_stage(output, Stage.PREPARE, inputs.prints.prepare, folder)
    return base


def fetch_model(
    config: RunConfig, model: source.ModelFiles, workspace: Path, reporter: Reporter
) -> Path:
    """Fetch what is small of the base model; returns the folder that it is in."""
    return source.fetch(model, config.storage, workspace / "tokenizer", reporter, weights=False)


def open_tokenizer(findings: Findings, base: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, whose chat template can do what the rows need."""
    # Here and not above: importing transformers takes seconds, which no mistake so far needed.
    from finetune_trainer.model.tokenizer import load_tokenizer  # noqa: PLC0415
    from finetune_trainer.prepare.checks import check_template, describe_template  # noqa: PLC0415

    trust = findings.config.model.trust_remote_code
    tokenizer = load_tokenizer(base, trust_remote_code=trust)
    check_template(tokenizer, system=any(rows.has_system for rows in findings.all_rows()))
    findings.template = describe_template(tokenizer)
    return tokenizer


def check_model(
    config: RunConfig,
    model: source.ModelFiles,
    base: Path,
    workspace: Path,
    reporter: Reporter,
    *,
    rows: Iterable[Sequence[Message]] = (),
) -> None:
    """Make sure that the model can be trained and exported as asked."""
    from finetune_trainer.prepare import checks  # noqa: PLC0415 - imports transformers

    checks.check_model(config, model, base, workspace, reporter, rows=rows)


def encode(findings: Findings, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Choose the held-out rows, and write the examples to `folder`."""
    from finetune_trainer.prepare.examples import check_lengths, write_examples  # noqa: PLC0415

    config = findings.config
    limit = config.training.max_sequence_length
    held = choose(findings)
    findings.examples = write_examples(findings.rows, held, tokenizer, limit, folder)
    check_lengths(findings.examples, config.dataset)
    if findings.eval_rows:
        everything = np.ones(len(findings.eval_rows.numbers), dtype=np.bool_)
        findings.eval_examples = write_examples(
            findings.eval_rows, everything, tokenizer, limit, folder
        )
        check_lengths(findings.eval_examples, config.dataset)


def choose(findings: Findings) -> Mask:
    """The rows of the dataset that are held out."""
    dataset = findings.config.dataset
    return hold_out(findings.rows.hashes, dataset.eval_fraction if dataset.splits else 0)


def read_summary(output: Folder, fingerprint: str) -> Prepared:
    """What the prepared examples are like."""
    path = f"{stage_folder(Stage.PREPARE, fingerprint)}/{SUMMARY}"
    data = output.read(path)
    if data is None:
        raise FileNotFoundError(f"{output.uri_of(path)} is missing")
    return Prepared.model_validate_json(data)


def describe(prepared: Prepared, held: Held) -> str:
    """One line for people."""
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
    if cut := found.truncated - prepared.left_out:
        parts.append(f"{cut} cut off at the maximum length")
    if prepared.left_out:
        parts.append(f"{prepared.left_out} rows left out: no answer within the maximum length")
    if held:
        parts.append(f"already there: {', '.join(held)}")
    return "; ".join(parts)
