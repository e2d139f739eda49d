"""prepare: the cheap checks first, so that a mistake shows within seconds; then the examples.

configuration -> dataset there, output writable -> CSV -> base model's files -> fingerprints
  -> what the store already holds -> tokenizer and chat template -> llama.cpp's converter knows
  the vocabulary -> examples.jsonl, dataset-report.json, complete.json
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from uuid import uuid4

from finetune_trainer.base_model import converter, source
from finetune_trainer.config import Dataset, Resolved, RunConfig, Stage
from finetune_trainer.fingerprint import fingerprints
from finetune_trainer.marker import MANIFEST, Marker, find_complete, save_stage, stage_folder
from finetune_trainer.outcome import Reason, StageError, StageResult
from finetune_trainer.prepare.dataset import Row, read_csv
from finetune_trainer.progress import Reporter
from finetune_trainer.storage import Folder, open_folder, split

REPORT = "dataset-report.json"

log = logging.getLogger(__name__)

Held = dict[Stage, Marker]
"""Stages whose result for their fingerprint the store holds."""


def run(config: RunConfig, workspace: Path, reporter: Reporter) -> StageResult:
    """Check the inputs and leave the examples in the store; raises StageError."""
    reporter.begin(Stage.PREPARE, "Checking access to dataset and output")
    check_config(config)
    output = open_folder(config.output.uri, config.storage)
    data = open_folder(split(config.dataset.source)[0], config.storage)
    check_readable(data, config.dataset)
    check_writable(output)
    etag, rows = fetch_rows(data, config.dataset, workspace, reporter)
    model = source.find(config.model, config.storage)
    prints = fingerprints(config, etag, model.revision)
    held: Held = {}
    for stage in Stage:
        if marker := find_complete(output, stage, getattr(prints, stage)):
            held[stage] = marker
    if Stage.EXPORT not in held:
        done = Stage.PREPARE in held
        check_model(config, model, rows, prepared=done, workspace=workspace, reporter=reporter)
    if Stage.PREPARE not in held:
        save_stage(output, Stage.PREPARE, prints.prepare, workspace / "prepared")
    report = read_report(output, prints.prepare)
    resolved = Resolved(
        fingerprints=prints,
        dataset_etag=etag,
        dataset_rows=report["examples"],
        model_revision=model.revision,
    )
    return StageResult(
        stage=Stage.PREPARE,
        reason=Reason.SUCCEEDED,
        message=summary(report, held),
        resolved=resolved,
        complete=tuple(held),
        artifacts=held[Stage.EXPORT].files if Stage.EXPORT in held else (),
        manifest_uri=output.uri_of(MANIFEST) if Stage.EXPORT in held else None,
    )


def check_config(config: RunConfig) -> None:
    """What no single field can say about itself."""
    columns = config.dataset.columns
    if columns.instruction == columns.response:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"spec.dataset.columns: instruction and response are both {columns.response!r}; "
            "name two columns.",
        )


def check_readable(data: Folder, dataset: Dataset) -> None:
    """Make sure that the dataset is there."""
    name = split(dataset.source)[1]
    if not name or data.stat(name) is None:
        raise StageError(
            Reason.DATASET_NOT_FOUND,
            f"There is no dataset at {dataset.source}: upload the CSV file there, or correct "
            "spec.dataset.source.",
        )


def check_writable(output: Folder) -> None:
    """Write a probe and delete it again, so that a run does not end with nowhere to go."""
    probe = f"stages/.write-check-{uuid4().hex[:12]}"
    output.write(probe, b"finetune-trainer checks that it can write here\n")
    output.delete([probe])


def fetch_rows(
    data: Folder, dataset: Dataset, workspace: Path, reporter: Reporter
) -> tuple[str, list[Row]]:
    """The dataset's ETag and its rows, both of one version of the file."""
    name = split(dataset.source)[1]
    file = workspace / "dataset.csv"
    for _ in range(3):
        before = data.stat(name)
        if before is None:
            break
        data.download(name, file, reporter.transfer("Fetching the dataset", before.size))
        if data.stat(name) == before:
            return before.etag, read_csv(file, dataset.columns, dataset.source)
    raise StageError(
        Reason.DATASET_UNREADABLE,
        f"{dataset.source} changes while it is read: apply the job when it is complete.",
    )


def check_model(
    config: RunConfig,
    model: source.ModelFiles,
    rows: list[Row],
    *,
    prepared: bool,
    workspace: Path,
    reporter: Reporter,
) -> None:
    """Check what is small of the base model, and write the examples unless they are there."""
    # Here and not above: importing transformers takes seconds, which no mistake so far needed.
    from finetune_trainer.base_model.tokenizer import load_tokenizer  # noqa: PLC0415
    from finetune_trainer.prepare.template import build_examples, write_examples  # noqa: PLC0415

    folder = source.fetch(model, config.storage, workspace / "tokenizer", reporter, weights=False)
    if not prepared:
        reporter.message(f"Applying the chat template to {len(rows)} rows")
        tokenizer = load_tokenizer(folder, trust_remote_code=config.model.trust_remote_code)
        examples = build_examples(rows, tokenizer, config.training.max_sequence_length)
        write_examples(examples, workspace / "prepared")
    if config.export.gguf:
        reporter.message("Checking that llama.cpp can convert the model")
        trust = config.model.trust_remote_code
        converter.check_vocabulary(folder, workspace / "vocabulary.gguf", trust_remote_code=trust)


def read_report(output: Folder, fingerprint: str) -> dict[str, int]:
    """The counts in the stage's dataset-report.json."""
    path = f"{stage_folder(Stage.PREPARE, fingerprint)}/{REPORT}"
    data = output.read(path)
    if data is None:
        raise FileNotFoundError(f"{output.uri_of(path)} is missing")
    report = json.loads(data)
    return {key: value for key, value in report.items() if isinstance(value, int)}


def summary(report: dict[str, int], held: Held) -> str:
    """One line for people."""
    parts = [f"{report['examples']} examples"]
    if report["truncated"]:
        parts.append(f"{report['truncated']} cut off at {report['maxSequenceLength']} tokens")
    if report["leftOut"]:
        parts.append(f"{report['leftOut']} rows left out: no answer within the maximum length")
    if held:
        parts.append(f"already there: {', '.join(held)}")
    return "; ".join(parts)
