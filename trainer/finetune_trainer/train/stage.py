"""The train stage: fetch examples and base model, let a worker run the recipe, save the adapter."""

from __future__ import annotations

import logging
from pathlib import Path

from finetune_trainer.contract import (
    PreparedRunConfig,
    Reason,
    Stage,
    StageError,
    StageResult,
    TrainingRecord,
)
from finetune_trainer.model import base_model
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.runtime.units import duration
from finetune_trainer.store import Folder, open_folder
from finetune_trainer.store.marker import EXAMPLES, HELD_OUT, METRICS, save_stage, stage_folder
from finetune_trainer.store.owner import check_owner
from finetune_trainer.train.link.work import Failed, Trained, TrainingWork, default_plan
from finetune_trainer.train.supervisor.checkpoints import CheckpointStore
from finetune_trainer.train.supervisor.ladder import descend
from finetune_trainer.train.supervisor.setup import MemoryNeeds, adapt_to_machine, read_needs
from finetune_trainer.train.supervisor.training_session import TrainingSession

log = logging.getLogger(__name__)


def run(config: PreparedRunConfig, workspace: Path, reporter: Reporter) -> StageResult:
    """Train the adapter for `config.resolved`. Raises StageError."""
    reporter.begin(Stage.TRAIN, "Fetching the examples")
    prints = config.resolved.fingerprints
    output = open_folder(config.output.folder, config.storage)
    check_owner(output, config.output, config.job)
    work = fetch_work(config, output, workspace, reporter)
    work, notices = adapt_to_machine(work, fetch_needs(config, work, output))
    session = TrainingSession(CheckpointStore(output, prints.train), reporter)
    for notice in notices:
        session.notice(notice)
    with session.active():
        trained = train(session.resume(work), session)
        result = workspace / "result"
        result.mkdir()
        work.adapter.rename(result / "adapter")
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


def fetch_work(
    config: PreparedRunConfig, output: Folder, workspace: Path, reporter: Reporter
) -> TrainingWork:
    """Download everything that the worker needs."""
    prepared = stage_folder(Stage.PREPARE, config.resolved.fingerprints.prepare)
    examples, held_out = workspace / EXAMPLES, workspace / HELD_OUT
    output.download(f"{prepared}/{EXAMPLES}", examples)
    if config.resolved.eval_rows:
        output.download(f"{prepared}/{HELD_OUT}", held_out)
    model = base_model.fetch_resolved(config, workspace / "model", reporter)
    workdir = workspace / "training"
    workdir.mkdir()
    return TrainingWork(
        config=config,
        plan=default_plan(config),
        max_sequence_length=config.training.max_sequence_length,
        engine="transformers",
        examples=examples,
        held_out=held_out if held_out.exists() else None,
        model=model,
        workdir=workdir,
    )


def fetch_needs(config: PreparedRunConfig, work: TrainingWork, output: Folder) -> MemoryNeeds:
    """What the model and the examples need of memory."""
    prepared = stage_folder(Stage.PREPARE, config.resolved.fingerprints.prepare)
    summary = output.read(f"{prepared}/summary.json")
    if summary is None:
        raise FileNotFoundError(f"{output.uri_of(prepared)}/summary.json is missing")
    return read_needs(work.model.path, summary)


def train(work: TrainingWork, session: TrainingSession) -> Trained:
    """Run workers to the end of the training. Raises StageError."""

    def newest() -> Path | None:
        return session.newest.folder if session.newest else None

    ending = descend(session.run_once, work, newest, session.notice)
    if isinstance(ending, Failed):
        raise StageError(ending.reason, ending.message, notices=tuple(session.notices))
    return ending
