"""What passes between the supervisor and the worker.

Below is what the supervisor asks for, and what the worker leaves: JSON files in the workdir.

channel  progress, notices and checkpoints on their way up; the step that is stored on its way down
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import signal
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from finetune_trainer.contract import (
    Base,
    LogEntry,
    Notice,
    NoticeCode,
    Reason,
    RunConfig,
    StageError,
    TrainingMetrics,
    TrainingPlan,
)
from finetune_trainer.model import ModelFolder

Engine = Literal["transformers", "unsloth"]

LENGTHS = "lengths.json"
WORKERS = "workers"  # process ids, one a line
TRAINED, FAILED = "trained.json", "failed.json"


class TrainingWork(Base):
    """One run of the worker. A further one, e.g. after memory ran out, gets a changed copy."""

    config: RunConfig
    plan: TrainingPlan
    """How a step is split into passes."""

    processes: int = 1
    """How many processes train together, each with a device of its own."""

    max_sequence_length: int
    """Tokens; at most what the spec says."""

    engine: Engine
    examples: Path
    """examples.jsonl, as `prepare` left it."""

    held_out: Path | None
    """eval.jsonl, or None when no row is held out."""

    model: ModelFolder
    """The base model."""

    initial_adapter: Path | None = None
    """Folder of the adapter to go on from, instead of one that changes nothing."""

    workdir: Path
    """Folder for everything that the worker writes."""

    resume_from: Path | None = None
    """Folder of the checkpoint to go on from."""

    @property
    def adapter(self) -> Path:
        """Where the adapter and the tokenizer go."""
        return self.workdir / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Where the Trainer writes its checkpoints."""
        return self.workdir / "trainer"

    @property
    def tensorboard(self) -> Path:
        return self.workdir / "tensorboard"


class Trained(Base):
    """What came out, beside the files of the adapter."""

    metrics: TrainingMetrics
    hyperparameters: dict[str, JsonValue]
    """The hyperparameters as they were applied, e.g. with the epochs that `auto` stood for."""

    history: tuple[LogEntry, ...] = ()
    """What the Trainer logged, step by step, for curves."""


class Failed(Base):
    reason: Reason
    message: str
    step: int | None = None
    """Optimizer steps that were complete."""

    checkpoint: Path | None = None
    """A checkpoint of that step, where it could still be written."""


class InterruptedTrainingError(StageError):
    """The training ended in between, and can go on from a checkpoint on disk if there is one."""

    def __init__(self, cause: StageError, step: int, checkpoint: Path | None) -> None:
        super().__init__(cause.reason, cause.message)
        self.step = step
        self.checkpoint = checkpoint


def as_failed(error: StageError) -> Failed:
    failed = Failed(reason=error.reason, message=error.message)
    if isinstance(error, InterruptedTrainingError):
        return failed.model_copy(update={"step": error.step, "checkpoint": error.checkpoint})
    return failed


def default_plan(config: RunConfig) -> TrainingPlan:
    """The plan of `prepare`, or what the spec says where there is none."""
    if config.resolved is not None and config.resolved.plan is not None:
        return config.resolved.plan
    training = config.training
    wish = training.gradient_checkpointing
    # On a GPU of unknown memory it is more often short than not.
    gpu = config.hardware.gpus > 0 if config.hardware else any(Path("/dev").glob("nvidia[0-9]*"))
    return TrainingPlan(
        batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        gradient_checkpointing=wish == "always" or (wish == "auto" and gpu),
    )


def trained_steps(checkpoint: Path | None) -> int:
    """Optimizer steps that are done in a checkpoint; 0 without one."""
    if checkpoint is None:
        return 0
    return int(json.loads((checkpoint / "trainer_state.json").read_bytes())["global_step"])


def write_failure(workdir: Path, error: StageError) -> None:
    """Leave why the worker failed. Of several processes, the first to fail gives the reason."""
    own = workdir / f"{FAILED}.{os.getpid()}"
    own.write_text(as_failed(error).model_dump_json(), encoding="utf-8")
    with suppress(FileExistsError):
        os.link(own, workdir / FAILED)  # atomic, and refused where another was first
    own.unlink()


def show_stacks(workdir: Path) -> None:
    """In a worker: write the stack of every thread into the log on SIGUSR1, whatever it does."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    with (workdir / WORKERS).open("a", encoding="ascii") as file:
        file.write(f"{os.getpid()}\n")


def signal_workers(workdir: Path, *signals: signal.Signals) -> None:
    """In the stage: send signals to the workers that are at work."""
    try:
        workers = [int(line) for line in (workdir / WORKERS).read_text(encoding="ascii").split()]
    except FileNotFoundError:  # none has come so far
        return
    for worker, number in itertools.product(workers, signals):
        with suppress(ProcessLookupError):
            os.kill(worker, number)


def write_lengths(workdir: Path, lengths: Iterable[int]) -> None:
    """Leave how many examples have how many tokens, for the memory ladder."""
    counts = sorted(Counter(int(length) for length in lengths).items())
    (workdir / LENGTHS).write_text(json.dumps(counts), encoding="utf-8")


def read_lengths(workdir: Path) -> dict[int, int]:
    """Length -> examples of it. Empty when the worker did not get so far."""
    file = workdir / LENGTHS
    return dict(json.loads(file.read_bytes())) if file.exists() else {}


def fallback_notice(evidence: str) -> Notice:
    """The transformers engine trains where the spec asks for Unsloth."""
    return Notice(
        code=NoticeCode.ENGINE_FALLBACK,
        evidence=f"{evidence:.300}",
        remedy="The transformers engine trains instead, with the same result. "
        "Set training.engine to transformers to silence this.",
    )
