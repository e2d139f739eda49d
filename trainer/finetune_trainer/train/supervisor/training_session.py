"""A training as the stage sees it: workers that come and go, and the checkpoints between them."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from finetune_trainer.contract import Notice, NoticeCode, Reason, StageError, TrainingPlan
from finetune_trainer.memory.gpus import HIDING, first_visible
from finetune_trainer.runtime import endings
from finetune_trainer.runtime.endings import MemoryFullError
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.train.link import FAILED, TRAINED, WORKERS, Failed, Trained, TrainingWork
from finetune_trainer.train.link.channel import WorkerMessage, listening, write_stored_step
from finetune_trainer.train.supervisor.checkpoints import (
    CheckpointMarker,
    CheckpointStore,
    CheckpointUploader,
    LocalCheckpoint,
)
from finetune_trainer.train.supervisor.stall_watch import StallWatch

# Programs. The names are text, because the stage imports nothing of the recipe.
TRAIN_WORKER = "finetune_trainer.train.recipe.train_worker"
SEVERAL_WORKERS = "finetune_trainer.train.recipe.processes"

REQUEST = "work.json"
VMSTAT = Path("/proc/vmstat")
UPLOAD_SECONDS = 2.0  # kept for the upload of the last checkpoint, at least

log = logging.getLogger(__name__)


class TrainingSession:
    """Runs workers for one fingerprint. `stop` is called from another thread."""

    def __init__(self, store: CheckpointStore, reporter: Reporter) -> None:
        self.notices: list[Notice] = []
        """Whatever the training noticed, and what was done about it."""

        self._store = store
        self._reporter = reporter
        self._worker = WorkerProcess()
        self._uploader = CheckpointUploader(store)
        self._searched_store = False
        self._drain: Callable[[], None] = lambda: None

    @property
    def newest(self) -> LocalCheckpoint | None:
        """The newest checkpoint on this machine, to go on from after a worker failed."""
        return self._uploader.newest

    @contextmanager
    def active(self) -> Iterator[None]:
        """While the block runs, a stop of the stage saves the last step.

        When the block fails, the newest checkpoint is brought to the store first, for the next
        attempt. Afterwards no upload is in progress.
        """
        try:
            with endings.saving(self.stop):
                yield
        except Exception:
            self._uploader.finish(time.monotonic() + endings.save_seconds())
            raise
        finally:
            self._uploader.close()

    def resume(self, work: TrainingWork) -> TrainingWork:
        """The same work from the newest checkpoint in the store on, if there is one."""
        target = work.workdir / "resumed"
        found = self._store.fetch_newest(target, lambda each: resume_obstacle(each, work.plan))
        local = None
        if found:
            plan = plan_to_resume_with(found.plan, work.plan)
            local = LocalCheckpoint(found.step, target, plan, found.max_sequence_length)
        self._uploader.start(local, partial(write_stored_step, work.workdir))
        self._searched_store = True
        if local is None:
            return work
        self.notice(
            Notice(
                code=NoticeCode.RESUMED,
                step=local.step,
                evidence="an earlier attempt left a checkpoint of this step",
                remedy=f"Going on from step {local.step}.",
            )
        )
        return resumed_from(work, local)

    def run_once(self, work: TrainingWork) -> Trained | Failed:
        """Run a worker to its end. Raises StageError when it left no reason."""
        if work.resume_from and self.newest and work.resume_from == self.newest.folder:
            # The plan may be another one by now, and the next attempt should begin with it.
            self._offer(work, self.newest.step, work.resume_from)

        watch = StallWatch(work.config.training, work.workdir)

        def handle(message: WorkerMessage) -> None:
            watch.heard(message)
            if message.progress:
                self._reporter.update(message.progress)
            if message.notice:
                self._notice_from_worker(message.notice)
            if message.checkpoint:
                self._offer(work, message.checkpoint.step, message.checkpoint.folder)

        with listening(work.workdir, handle) as self._drain:
            ending = self._worker.run(work, watch)
        if isinstance(ending, Failed) and ending.checkpoint and ending.step is not None:
            self._offer(work, ending.step, ending.checkpoint)
        return ending

    def notice(self, notice: Notice) -> None:
        """Keep a notice, and tell people."""
        if notice in self.notices:
            return
        self.notices.append(notice)
        self._reporter.notice(notice)

    def stop(self, deadline: float) -> str:
        """Save the last step until the deadline. Says what the next attempt begins with."""
        left = max(deadline - time.monotonic(), 0)
        upload = min(max(UPLOAD_SECONDS, 2 * self._uploader.seconds), left / 2)
        ended = self._worker.stop(deadline - upload)
        self._drain()
        step = self._uploader.finish(deadline)
        late = "" if ended else "the step that ran did not end within the grace period; "
        if step is not None:
            return f"{late}the next attempt goes on from step {step}"
        if not self._searched_store:
            return "the next attempt goes on from the newest checkpoint, if there is one"
        return f"{late}there is no checkpoint yet, the next attempt starts anew" if late else ""

    def clear(self) -> None:
        """The result is in the store, so its checkpoints can go."""
        try:
            self._store.clear()
        except (StageError, OSError) as error:
            log.warning("Checkpoints stay in the store: %s", error)

    def _offer(self, work: TrainingWork, step: int, folder: Path) -> None:
        self._uploader.offer(LocalCheckpoint(step, folder, work.plan, work.max_sequence_length))

    def _notice_from_worker(self, notice: Notice) -> None:
        # A worker that goes on may see what the one before saw, with other figures.
        if notice.code not in {known.code for known in self.notices}:
            self.notice(notice)


def resumed_from(work: TrainingWork, local: LocalCheckpoint) -> TrainingWork:
    """The work from a checkpoint on."""
    update = {
        "resume_from": local.folder,
        "plan": local.plan,
        "max_sequence_length": local.max_sequence_length,
    }
    return work.model_copy(update=update)


def plan_to_resume_with(saved: TrainingPlan, planned: TrainingPlan) -> TrainingPlan:
    """The plan of the checkpoint, which may have been made smaller after memory ran out.

    The new plan where the checkpoint's is for other devices, or for larger ones than are here.
    """
    same = saved.parallelism == planned.parallelism and _rows_on_device(saved) == _rows_on_device(
        planned
    )
    recomputes = saved.gradient_checkpointing or not planned.gradient_checkpointing
    return saved if same and recomputes and not _is_larger(saved, planned) else planned


def _is_larger(one: TrainingPlan, other: TrainingPlan) -> bool:
    """Whether its passes may hold more."""
    if one.batch_size != other.batch_size:
        return one.batch_size > other.batch_size
    return (one.pass_tokens or 0) > (other.pass_tokens or 0)


def resume_obstacle(checkpoint: CheckpointMarker, planned: TrainingPlan) -> str | None:
    """Why a checkpoint can't be loaded with this plan: a sharded one has another format."""
    saved = checkpoint.plan.parallelism
    if saved != planned.parallelism and "fsdp" in (saved, planned.parallelism):
        return f"it was written with parallelism {saved}, and this is {planned.parallelism}"
    return None


def _rows_on_device(plan: TrainingPlan) -> int:
    """Rows of a step on each device."""
    return plan.batch_size * plan.gradient_accumulation_steps


class WorkerProcess:
    """The process that trains, or torchrun with several of them."""

    def __init__(self, module: str = TRAIN_WORKER) -> None:
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, work: TrainingWork, watch: StallWatch | None = None) -> Trained | Failed:
        """Run it to its end. Raises StageError when it left no reason."""
        watch = watch or StallWatch(work.config.training, work.workdir)
        for name in (TRAINED, FAILED, WORKERS):
            (work.workdir / name).unlink(missing_ok=True)
        request = work.workdir / REQUEST
        request.write_text(work.model_dump_json(indent=2), encoding="utf-8")
        endings.wait_if_stopping()
        kills = count_oom_kills()
        # A session of its own: Ctrl-C is for the stage, which then tells the worker to save.
        with subprocess.Popen(
            [*self._command(work, request), str(os.getpid())],
            start_new_session=True,
            env=worker_environment(work.processes, os.environ),
        ) as process:
            self._process = process
            with watch.over(process):
                status = process.wait()
        # A worker that was told to stop ends as well. Then the stop has the last word.
        endings.wait_if_stopping()
        if watch.stalled and status != 0:
            return Failed(reason=Reason.STALLED, message=watch.words)
        return _read_ending(work, status, may_be_memory=kills is None or kills != count_oom_kills())

    def stop(self, deadline: float) -> bool:
        """Tell the worker to save and end. Returns whether it did so before the deadline."""
        process = self._process
        if process is None or process.poll() is not None:
            return True
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            return False
        return True

    def _command(self, work: TrainingWork, request: Path) -> list[str]:
        return worker_command(self._module, request, work.processes, endings.save_seconds())


def worker_environment(processes: int, environment: Mapping[str, str]) -> dict[str, str]:
    """One process sees one GPU: with more, the Trainer would split each pass between them."""
    if processes > 1:
        return dict(environment)
    return {**environment, HIDING: first_visible(environment)}


def worker_command(
    module: str, request: Path, processes: int, shutdown_seconds: float
) -> list[str]:
    """Start one worker, or torchrun with one for each process. The stage's pid has to follow.

    On a stop the workers have `shutdown_seconds` to save before torchrun kills them.
    """
    if processes == 1:
        return [sys.executable, "-m", module, str(request)]
    return [
        sys.executable,
        "-m",
        SEVERAL_WORKERS,
        "--standalone",
        "--local-addr=127.0.0.1",  # a pod's own name need not resolve
        f"--nproc-per-node={processes}",
        f"--shutdown-timeout={max(int(shutdown_seconds), 1)}",
        "--module",
        module,
        str(request),
    ]


def count_oom_kills() -> int | None:
    """How many processes this machine has killed for want of memory; None if it doesn't tell."""
    try:
        counters = dict(line.split() for line in VMSTAT.read_text().splitlines())
        return int(counters["oom_kill"])
    except (OSError, ValueError, KeyError):
        return None


def _read_ending(work: TrainingWork, status: int, *, may_be_memory: bool) -> Trained | Failed:
    trained, failed = work.workdir / TRAINED, work.workdir / FAILED
    if status == 0 and trained.exists():
        return Trained.model_validate_json(trained.read_bytes())
    if failed.exists():
        return Failed.model_validate_json(failed.read_bytes())
    if status in (-signal.SIGKILL, 128 + signal.SIGKILL) and may_be_memory:
        raise MemoryFullError(
            Reason.OOM_KILLED,
            "The training process was killed, most likely for want of memory.",
        )
    raise StageError(
        Reason.INTERNAL_ERROR,
        f"The training process ended with status {status} (the log has the details).",
    )
