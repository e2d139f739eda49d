"""Memory that really runs out, under the trainer's own supervisor and its workers.

    python -m benchmarks.gpu.ladder <what a worker is given> <pid of the stage>

is the trainer's worker on a device that is full but for ROOM bytes once the model is loaded: of a
GPU a tensor takes the rest, so that the driver itself refuses; of a CPU the kernel refuses, by the
limit of the process (RLIMIT_DATA).
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.outcome import Outcome
from benchmarks.gpu.trainings import (
    Ask,
    Bench,
    attempt_of,
    fine_tune,
    free_memory,
    hooked,
    make_work,
    read_adapter,
    switched,
    unfuse,
)
from finetune_trainer.contract import NoticeCode, Storage
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import open_folder
from finetune_trainer.train import train_stage
from finetune_trainer.train.recipe import train_worker
from finetune_trainer.train.recipe.trainer import RecipeTrainer
from finetune_trainer.train.supervisor import training_session
from finetune_trainer.train.supervisor.checkpoints import CheckpointStore
from tests.integration.trainer.fork_server import ForkedWorker, with_popen

ROOM = "FINETUNE_WORKER_ROOM"  # environment variable: bytes
SLACK = 130_000_000  # what else a training takes once it runs: stacks of threads, workspaces
SHARE = 0.6  # of what the first plan's passes take, so that a half or a quarter of them fits


def goes_down_the_ladder(bench: Bench) -> Outcome:
    """Eight rows a pass don't fit: fewer do, and the adapter is the same as where all fit."""
    from benchmarks.gpu.checks import same_adapters  # noqa: PLC0415 - a worker needs no checks

    rows = 8
    ask = Ask(
        model="wide",
        lengths=(bench.scale.ladder_row,) * rows,
        settings={
            "warmupRatio": 0,
            "batchSize": rows,
            "gradientAccumulationSteps": 1,
            "learningRate": 1e-3,
            "loggingSteps": 1,
            "maxSequenceLength": bench.scale.ladder_row,
            "gradientCheckpointing": "never",
            "lora": {"dropout": 0},
        },
        split=(rows, 1),
    )
    work = make_work(bench, ask, "ladder")
    attempt = attempt_of(bench, ask, work.config)
    # What grows with the rows of a pass: neither weights nor what the process takes by itself.
    passes = rows * (attempt.needs(2, False) - attempt.needs(1, False))
    session = training_session.TrainingSession  # made below, with these workers
    workers = partial(training_session.WorkerProcess, __name__)
    starts = {"subprocess": with_popen(ForkedWorker)} if bench.scale.tiny else {}
    with (
        switched(training_session, **starts),
        _variable(ROOM, str(round(SLACK + SHARE * passes))),
        switched(training_session, WorkerProcess=workers),
    ):
        stage = session(
            CheckpointStore(open_folder(str(work.workdir / "out"), Storage()), "0" * 64), Reporter()
        )
        with stage.active():
            train_stage.train(stage.resume(work), stage)
    found = [f"{notice.code}: {notice.remedy}" for notice in stage.notices]
    halved = [n for n in stage.notices if n.code == NoticeCode.BATCH_HALVED]
    if not halved:
        return Outcome.of_check(False, "memory did not run out", {"notices": found})
    fits = make_work(bench, ask, "fits")
    fine_tune(fits)
    outcome = same_adapters(
        read_adapter(work), read_adapter(fits), notices=found, room=SLACK + SHARE * passes
    )
    return outcome.saying(f"ran out {len(stage.notices)} times, then {outcome.words}")


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


class FullDevice:
    """Takes all memory but some when a trainer is ready to train."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._taken: torch.Tensor | None = None

    def fill(self, trainer: RecipeTrainer) -> None:
        """Leave that much."""
        free_memory()
        if trainer.args.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info()
            size = max(free - self._room, 0)
            self._taken = torch.empty(size, dtype=torch.uint8, device=trainer.args.device)
            return
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))
        resource.setrlimit(resource.RLIMIT_DATA, (used + self._room, resource.RLIM_INFINITY))


def main(request: Path, parent: int) -> int:
    """Be the worker."""
    full = FullDevice(int(os.environ[ROOM]))
    hooks = [full.fill] if torch.cuda.is_available() else [unfuse, full.fill]
    with hooked(hooks):
        return train_worker.main(request, parent)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
