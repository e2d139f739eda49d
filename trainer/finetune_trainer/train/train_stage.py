"""The train stage: fetch examples and base model, let a worker run the recipe, save the adapter."""

from __future__ import annotations

import logging
from pathlib import Path

from pydantic import ValidationError

from finetune_trainer.contract import (
    PreparedRunConfig,
    Reason,
    Stage,
    StageError,
    StageResult,
    TrainingMetrics,
    TrainingRecord,
)
from finetune_trainer.model import initial_adapter, prequantized
from finetune_trainer.runtime import duration
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import Folder, open_folder
from finetune_trainer.store.marker import (
    EXAMPLES,
    HELD_OUT,
    METRICS,
    SUMMARY,
    TOKENS,
    StageFiles,
    check_owner,
    find_complete,
    open_stage,
    save_stage,
)
from finetune_trainer.train.link import Failed, Trained, TrainingWork, default_plan
from finetune_trainer.train.supervisor.checkpoints import CheckpointStore
from finetune_trainer.train.supervisor.ladder import descend
from finetune_trainer.train.supervisor.setup import adapt_to_machine, claim_gpus, read_needs
from finetune_trainer.train.supervisor.training_session import TrainingSession

log = logging.getLogger(__name__)


def run(config: PreparedRunConfig, workspace: Path, reporter: Reporter) -> StageResult:
    """Train the adapter for `config.resolved`. Raises StageError."""
    reporter.begin(Stage.TRAIN, "Fetching the examples")
    prints = config.resolved.fingerprints
    output = open_folder(config.output.folder, config.storage)
    check_owner(output, config.output, config.job)
    if done := find_trained(output, prints.train):
        return done
    gpus = claim_gpus(config)  # before minutes of downloads, while others wait for a GPU
    prepared = open_stage(output, Stage.PREPARE, prints.prepare)
    work = fetch_work(config, prepared, workspace, reporter)
    needs = read_needs(work.model.path, prepared.read(SUMMARY))
    work, notices = adapt_to_machine(work, needs, gpus)
    session = TrainingSession(CheckpointStore(output, prints.train), reporter)
    for notice in notices:
        session.notice(notice)
    with session.active():
        trained = train(session.resume(work), session)
        result = workspace / "result"
        result.mkdir()
        work.adapter.rename(result / work.adapter.name)
        if work.tensorboard.is_dir():
            work.tensorboard.rename(result / "tensorboard")
        record = TrainingRecord(
            metrics=trained.metrics,
            hyperparameters=trained.hyperparameters,
            notices=tuple(session.notices),
            history=trained.history,
        )
        (result / METRICS).write_text(record.model_dump_json(indent=2, exclude_none=True))
        reporter.message("Saving the adapter")
        save_stage(output, Stage.TRAIN, prints.train, result)
    session.clear()
    return StageResult(
        stage=Stage.TRAIN,
        reason=Reason.SUCCEEDED,
        message=f"loss {trained.metrics.final_loss:.4f} "
        f"after {duration(trained.metrics.train_runtime_seconds or 0)}",
        metrics=trained.metrics.named(),
        notices=tuple(session.notices),
    )


def find_trained(output: Folder, fingerprint: str) -> StageResult | None:
    """The result of this very training if the store holds it, whoever trained it; else None.

    A stage may be started again after it has ended, e.g. when its pod vanished with its last word.
    Its checkpoints are gone by then, so it would train from the start.
    """
    marker = find_complete(output, Stage.TRAIN, fingerprint)
    if marker is None:
        return None
    try:
        data = StageFiles(output, marker).read(METRICS)
        record = TrainingRecord.model_validate_json(data)
    except ValidationError:
        log.warning("%s is no record of this version; figures are missing", METRICS)
        record = TrainingRecord(metrics=TrainingMetrics(), hyperparameters={})
    return StageResult(
        stage=Stage.TRAIN,
        reason=Reason.SUCCEEDED,
        message=f"the store already holds the adapter: {output.uri_of(marker.base)}",
        metrics=record.metrics.named(),
        notices=record.notices,
    )


def fetch_work(
    config: PreparedRunConfig, prepared: StageFiles, workspace: Path, reporter: Reporter
) -> TrainingWork:
    """Download everything that the worker needs; `prepared` is what `prepare` left."""
    examples = prepared.fetch(EXAMPLES, workspace / EXAMPLES)
    held_out = None
    if config.resolved.eval_rows:
        held_out = prepared.fetch(HELD_OUT, workspace / HELD_OUT)
    model = prequantized.fetch_whole(config, workspace / "model", reporter)
    workdir = workspace / "training"
    workdir.mkdir()
    return TrainingWork(
        config=config,
        plan=default_plan(config),
        max_sequence_length=config.training.max_sequence_length,
        engine="transformers",
        examples=examples,
        held_out=held_out,
        tokens=fetch_tokens(prepared, EXAMPLES, workspace),
        held_out_tokens=fetch_tokens(prepared, HELD_OUT, workspace) if held_out else None,
        model=model,
        initial_adapter=initial_adapter.fetch_resolved(config, workspace / "initial"),
        workdir=workdir,
    )


def fetch_tokens(prepared: StageFiles, of: str, workspace: Path) -> Path | None:
    """Bring the tokens of a file of examples to disk, where they are there.

    An earlier release left none. The training makes them anew, so nothing depends on them.
    """
    name = TOKENS[of]
    if prepared.marker.sha256_of(name) is None:
        return None
    try:
        return prepared.fetch(name, workspace / name)
    except StageError as error:
        if error.reason is not Reason.STORED_FILE_CHANGED:
            raise
        log.warning("%s is tokenized again: %s", of, error.message)
        return None


def train(work: TrainingWork, session: TrainingSession) -> Trained:
    """Run workers to the end of the training. Raises StageError."""

    def newest() -> Path | None:
        return session.newest.folder if session.newest else None

    ending = descend(session.run_once, work, newest, session.notice)
    if isinstance(ending, Failed):
        raise StageError(ending.reason, ending.message, notices=tuple(session.notices))
    return ending
