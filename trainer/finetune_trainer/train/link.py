"""What passes between the supervisor and its workers, over one connection for each worker.

A worker connects to a socket of the stage, says its process id and gets its work. Then they talk:

    up      progress, notices, checkpoints, signs of life; at last the result, or why it failed
    down    the step of the newest checkpoint that the stage is done with

The stage owns the status, the store and the decisions. The worker only says what happens. A socket
works through any number of processes in between, such as torchrun, and ends with either side. What
passes is JSON, since unpickling would let a model with its own code into the stage.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Client, Connection, wait
from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from finetune_trainer.contract import (
    Base,
    LogEntry,
    Notice,
    NoticeCode,
    Progress,
    Reason,
    RunConfig,
    StageError,
    TrainingMetrics,
    TrainingPlan,
)
from finetune_trainer.model import ModelFolder

Engine = Literal["transformers", "unsloth"]

# --- What is said ------------------------------------------------------------------------------


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

    tokens: Path | None = None
    """`examples` in tokens, as `prepare` left them; None where it left none."""

    held_out_tokens: Path | None = None
    """The same of `held_out`."""

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
        """Where the adapter, or the whole model, and the tokenizer go."""
        return self.workdir / self.config.training.result_folder

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

    lengths: dict[int, int] = {}
    """Tokens -> how many examples have so many; empty when the worker did not get so far."""

    at: float = 0.0
    """Seconds on the clock that all processes share."""

    lost_peer: bool = False
    """Whether it may only say that another process of the training is gone."""


class CheckpointOnDisk(Base):
    """A checkpoint that is complete on disk."""

    step: int
    folder: Path


class WorkerMessage(Base):
    """It has one of these fields."""

    process: int | None = None
    """The worker's process id, first of all."""

    lengths: dict[int, int] | None = None
    """Tokens -> how many examples have so many, for the memory ladder."""

    progress: Progress | None = None
    """Changes of status.progress: a field that is set to None is cleared, one left out stays."""

    notice: Notice | None = None
    checkpoint: CheckpointOnDisk | None = None
    alive: bool | None = None
    """A sign of life, while there is nothing else to say."""

    trained: Trained | None = None
    failed: Failed | None = None


class InterruptedTrainingError(StageError):
    """The training ended in between, and can go on from a checkpoint on disk if there is one."""

    def __init__(self, cause: StageError, step: int, checkpoint: Path | None) -> None:
        super().__init__(cause.reason, cause.message)
        self.step = step
        self.checkpoint = checkpoint


def as_failed(error: StageError, *, lost_peer: bool = False) -> Failed:
    failed = Failed(
        reason=error.reason, message=error.message, at=time.monotonic(), lost_peer=lost_peer
    )
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


def fallback_notice(evidence: str) -> Notice:
    """The transformers engine trains where the spec asks for Unsloth."""
    return Notice(
        code=NoticeCode.ENGINE_FALLBACK,
        evidence=f"{evidence:.300}",
        remedy="The transformers engine trains instead, with the same result. "
        "Set training.engine to transformers to silence this.",
    )


# --- The worker's end --------------------------------------------------------------------------

ALIVE_SECONDS = 0.5  # between two signs of life


class Channel:
    """The worker's end. It is also the publisher of the worker's Reporter."""

    def __init__(self, address: Path) -> None:
        self._connection = Client(str(address), family="AF_UNIX")
        self._lock = threading.Lock()
        self._lived_at = 0.0
        self._send(WorkerMessage(process=os.getpid()))
        self.work = TrainingWork.model_validate_json(self._connection.recv_bytes())
        self._stored_step: int | None = json.loads(self._connection.recv_bytes())

    def publish(self, changes: Progress) -> None:
        self._send(WorkerMessage(progress=changes))

    def notice(self, notice: Notice) -> None:
        self._send(WorkerMessage(notice=notice))

    def checkpoint(self, step: int, folder: Path) -> None:
        self._send(WorkerMessage(checkpoint=CheckpointOnDisk(step=step, folder=folder)))

    def lengths(self, lengths: Iterable[int]) -> None:
        """Say how many tokens each example has."""
        self._send(WorkerMessage(lengths=dict(sorted(Counter(map(int, lengths)).items()))))

    def alive(self) -> None:
        """Say that the training isn't stuck; from its main thread, and as often as one likes."""
        now = time.monotonic()
        if now - self._lived_at >= ALIVE_SECONDS:
            self._lived_at = now
            self._send(WorkerMessage(alive=True))

    def trained(self, trained: Trained) -> None:
        self._send(WorkerMessage(trained=trained))

    def failed(self, failed: Failed) -> None:
        self._send(WorkerMessage(failed=failed))

    def stored_step(self, seconds: float = 0.0) -> int | None:
        """All checkpoints up to this step are done with; None where nobody uploads.

        Waits so long at most, where there is nothing new.
        """
        while self._connection.poll(seconds):
            self._stored_step, seconds = json.loads(self._connection.recv_bytes()), 0.0
        return self._stored_step

    def close(self) -> None:
        self._connection.close()

    def _send(self, message: WorkerMessage) -> None:
        with self._lock:
            self._connection.send_bytes(message.model_dump_json(exclude_unset=True).encode())


# --- The stage's end ---------------------------------------------------------------------------

CLOSE_SECONDS = 2.0  # for what has come and isn't handled
LONGEST_FOLDER = 80  # bytes; the path of a socket has about a hundred at most

Handler = Callable[[WorkerMessage], None]


@contextmanager
def listening(
    work: TrainingWork, handle: Handler, stored_step: Callable[[], int | None] = lambda: None
) -> Iterator[StageLink]:
    """Give the work to whoever connects, and call `handle`, in a thread, with what it says.

    When the block has ended, all that the workers sent is handled.
    """
    usual = tempfile.gettempdir()
    place = usual if len(os.fsencode(usual)) <= LONGEST_FOLDER else "/tmp"  # noqa: S108 - a folder for its owner only
    with tempfile.TemporaryDirectory(
        prefix="training-", dir=place, ignore_cleanup_errors=True
    ) as folder:
        link = StageLink(Path(folder, "socket"), work, handle, stored_step)
        try:
            yield link
        finally:
            link.close()
    if link.errors:
        raise link.errors[0]


class StageLink:
    """The stage's end of all connections."""

    def __init__(
        self,
        address: Path,
        work: TrainingWork,
        handle: Handler,
        stored_step: Callable[[], int | None],
    ) -> None:
        self.address = address
        self.errors: list[Exception] = []
        self._work = work
        self._handle = handle
        self._stored_step = stored_step
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(address))
        self._server.listen()
        self._lock = threading.Lock()
        self._workers: list[Connection] = []
        self._closing = False
        self._thread = threading.Thread(target=self._read, name="messages", daemon=True)
        self._thread.start()

    def tell_stored_step(self) -> None:
        """Let the workers know that it has changed."""
        with self._lock:
            for worker in self._workers:
                self._answer(worker, json.dumps(self._stored_step()))

    def close(self) -> None:
        self._closing = True
        with Client(str(self.address)):  # which wakes the thread
            self._thread.join(CLOSE_SECONDS)
        self._server.close()
        for worker in self._workers:
            worker.close()

    def _read(self) -> None:
        while True:
            ready = wait([self._server, *self._workers])
            self._receive()
            if self._closing:
                return
            if self._server in ready:
                self._accept()

    def _accept(self) -> None:
        connected, _ = self._server.accept()
        worker = Connection(connected.detach())
        with self._lock:
            self._workers.append(worker)
            self._answer(worker, self._work.model_dump_json())
            self._answer(worker, json.dumps(self._stored_step()))

    def _receive(self) -> None:
        """Handle whatever has come."""
        while ready := wait(self._workers, 0):
            for worker in [each for each in self._workers if each in ready]:
                try:
                    data = worker.recv_bytes()
                except (EOFError, OSError):  # it has ended, maybe within a message
                    with self._lock:
                        self._workers.remove(worker)
                    worker.close()
                    continue
                try:
                    self._handle(WorkerMessage.model_validate_json(data))
                except Exception as error:  # raised by `listening`, in the thread of its caller
                    self.errors.append(error)

    def _answer(self, worker: Connection, message: str) -> None:
        with suppress(OSError):  # it has ended
            worker.send_bytes(message.encode())
