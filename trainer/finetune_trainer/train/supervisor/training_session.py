"""A training as the stage sees it: workers that come and go, and the checkpoints between them."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune_trainer.contract import (
    Notice,
    NoticeCode,
    Reason,
    StageError,
    Tracker,
    Training,
    TrainingPlan,
    parse_duration,
)
from finetune_trainer.memory.gpus import HIDING, first_visible
from finetune_trainer.runtime import duration, lifecycle
from finetune_trainer.runtime.child import inherited
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.train.link import (
    CLOSE_SECONDS,
    Failed,
    Handler,
    StageLink,
    Trained,
    TrainingWork,
    WorkerMessage,
    listening,
)
from finetune_trainer.train.supervisor.checkpoints import (
    CheckpointMarker,
    CheckpointStore,
    CheckpointUploader,
    LocalCheckpoint,
)
from finetune_trainer.train.supervisor.setup import TRACKER_VARIABLES

# Programs. The names are text, because the stage imports nothing of the recipe.
TRAIN_WORKER = "finetune_trainer.train.recipe.train_worker"
SEVERAL_WORKERS = "finetune_trainer.train.recipe.processes"

VMSTAT = Path("/proc/vmstat")
TICK_SECONDS = 5.0  # at most, between two looks
STACK_SECONDS = 5.0  # for writing the stacks
BEFORE_FIRST_STEP = 2  # times the timeout: the model is loaded, and kernels are compiled
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
            with lifecycle.saving(self.stop):
                yield
        except Exception:
            self._uploader.finish(time.monotonic() + lifecycle.save_seconds())
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
        self._uploader.start(local, self._worker.tell_stored_step)
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
        """Run a worker to its end."""
        if work.resume_from and self.newest and work.resume_from == self.newest.folder:
            # The plan may be another one by now, and the next attempt should begin with it.
            self._offer(work, self.newest.step, work.resume_from)

        def handle(message: WorkerMessage) -> None:
            if message.progress:
                self._reporter.update(message.progress)
            if message.notice:
                self._notice_from_worker(message.notice)
            if message.checkpoint:
                self._offer(work, message.checkpoint.step, message.checkpoint.folder)

        ending = self._worker.run(work, handle)
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
    recomputes = _recomputed(saved) >= _recomputed(planned)
    return saved if same and recomputes and not _is_larger(saved, planned) else planned


def _recomputed(plan: TrainingPlan) -> float:
    """Share of the layers whose activations are computed again."""
    return 1 / plan.recompute_every if plan.gradient_checkpointing else 0


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
        self._link: StageLink | None = None
        self._over = threading.Event()
        self._over.set()
        self._stored_step: int | None = None

    def run(self, work: TrainingWork, handle: Handler = lambda _: None) -> Trained | Failed:
        """Run it to its end. `handle` hears, in a thread, what it says."""
        watch, said = StallWatch(work.config.training), list[WorkerMessage]()

        def hear(message: WorkerMessage) -> None:
            watch.heard(message)
            if message.lengths or message.trained or message.failed:
                said.append(message)
            handle(message)

        lifecycle.wait_if_stopping()
        kills = count_oom_kills()
        self._over.clear()
        try:
            with listening(work, hear, lambda: self._stored_step) as self._link:
                command = self._command(work, self._link.address)
                environment = worker_environment(
                    work.processes, work.config.training.report_to, os.environ
                )
                status = self._run(command, environment, watch)
        finally:
            self._over.set()
        # A worker that was told to stop ends as well. Then the stop has the last word.
        lifecycle.wait_if_stopping()
        if watch.stalled and status != 0:
            return Failed(reason=Reason.STALLED, message=watch.words)
        return ending_of(said, status, may_be_memory=kills is None or kills != count_oom_kills())

    def stop(self, deadline: float) -> bool:
        """Tell the worker to save and end. Returns whether it did so before the deadline."""
        process = self._process
        ended = process is None or process.poll() is not None
        if process and not ended:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
                ended = True
            except subprocess.TimeoutExpired:
                process.kill()
        self._over.wait(CLOSE_SECONDS)  # until all that it said is handled
        return ended

    def tell_stored_step(self, step: int) -> None:
        """All checkpoints up to this step are done with."""
        self._stored_step = step
        if self._link:
            self._link.tell_stored_step()

    def _run(self, command: list[str], environment: dict[str, str], watch: StallWatch) -> int:
        # A session of its own: Ctrl-C is for the stage, which then tells the worker to save.
        with (
            subprocess.Popen(
                [*command, str(os.getpid())],
                start_new_session=True,
                env=environment,
            ) as self._process,
            watch.over(self._process),
        ):
            return self._process.wait()

    def _command(self, work: TrainingWork, address: Path) -> list[str]:
        return worker_command(self._module, address, work.processes, lifecycle.save_seconds())


class StallWatch:
    """Watches over one worker, or over torchrun's, and ends one that hangs, e.g. in a collective or
    in the driver, where waiting would never end.

    The worker gives signs of life through its connection, from its main thread: at each pass and
    step, and while it waits for the store. When none has come for training.stallTimeout, every
    thread of it writes its stack into the log, and it is killed. The stage then ends as Stalled,
    and the next attempt goes on from the newest checkpoint, maybe on another node.
    """

    def __init__(self, training: Training) -> None:
        self._timeout = parse_duration(training.stall_timeout).total_seconds()
        self._tick = min(TICK_SECONDS, self._timeout / 10)
        self._workers: set[int] = set()  # process ids
        self._silent = 0.0
        self._first_step: int | None = None
        self._limit = BEFORE_FIRST_STEP * self._timeout
        self.stalled = False
        """Whether it has ended the worker."""

    @property
    def words(self) -> str:
        return (
            f"Nothing came from the training process for {duration(self._limit)}, so it was ended "
            "(spec.training.stallTimeout). Its log shows where each of its threads was. The next "
            "attempt goes on from the newest checkpoint."
        )

    def heard(self, message: WorkerMessage) -> None:
        """The worker has said something."""
        self._silent = 0.0
        if message.process is not None:
            self._workers.add(message.process)
        step = message.progress.step if message.progress else None
        if step is None:
            return
        if self._first_step is None:
            self._first_step = step  # it says where it begins
        elif step > self._first_step:
            self._limit = self._timeout

    @contextmanager
    def over(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """Watch while the block runs, which waits for the process."""
        ended = threading.Event()
        thread = threading.Thread(target=self._watch, args=(process, ended), name="stall watch")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _watch(self, process: subprocess.Popen[bytes], ended: threading.Event) -> None:
        while not ended.wait(self._tick):
            # Not by the clock: where the pod as a whole was frozen, the worker is not to blame.
            self._silent += self._tick
            if lifecycle.is_stopping():
                return  # the stop has its own deadline
            if self._silent >= self._limit:
                self._end(process, ended)
                return

    def _end(self, process: subprocess.Popen[bytes], ended: threading.Event) -> None:
        self.stalled = True
        log.error("%s Where its threads are:", self.words)
        # One that was stopped by a signal writes its stack when it continues, first of all.
        for worker, number in itertools.product(self._workers, (signal.SIGUSR1, signal.SIGCONT)):
            with suppress(ProcessLookupError):
                os.kill(worker, number)
        ended.wait(STACK_SECONDS)
        process.kill()  # workers of torchrun die with it


def worker_environment(
    processes: int, trackers: Iterable[Tracker], environment: Mapping[str, str]
) -> dict[str, str]:
    """What a child gets, and what its trackers need: a model's own code runs in the worker.

    One process sees one GPU: with more, the Trainer would split each pass between them.
    """
    prefixes = tuple(prefix for each in trackers for prefix in TRACKER_VARIABLES[each])
    asked = {name: environment[name] for name in environment if name.startswith(prefixes)}
    seen = inherited(environment) | asked
    return seen if processes > 1 else {**seen, HIDING: first_visible(environment)}


def worker_command(
    module: str, address: Path, processes: int, shutdown_seconds: float
) -> list[str]:
    """Start one worker, or torchrun with one for each process. The stage's pid has to follow.

    On a stop the workers have `shutdown_seconds` to save before torchrun kills them.
    """
    if processes == 1:
        return [sys.executable, "-m", module, str(address)]
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
        str(address),
    ]


def count_oom_kills() -> int | None:
    """How many processes this machine has killed for want of memory; None if it doesn't tell."""
    try:
        counters = dict(line.split() for line in VMSTAT.read_text().splitlines())
        return int(counters["oom_kill"])
    except (OSError, ValueError, KeyError):
        return None


def ending_of(
    said: Sequence[WorkerMessage], status: int, *, may_be_memory: bool
) -> Trained | Failed:
    """How a training ended, by its workers' words. The first of them to fail gives the reason."""
    trained = [each.trained for each in said if each.trained]
    if status == 0 and trained:
        return trained[0]
    killed = status < 0 or status > 128  # it said nothing, and those that lost it say that
    failures = [each.failed for each in said if each.failed]
    known = [each for each in failures if not (each.lost_peer and killed)]
    if known:
        failed = min(known, key=lambda each: (each.lost_peer, each.at))
    elif status in (-signal.SIGKILL, 128 + signal.SIGKILL) and may_be_memory:
        failed = Failed(
            reason=Reason.OOM_KILLED,
            message="The training process was killed, most likely for want of memory.",
        )
    else:
        failed = Failed(
            reason=Reason.INTERNAL_ERROR,
            message=f"The training process ended with status {status} (the log has the details).",
        )
    lengths = next((each.lengths for each in said if each.lengths), {})
    return failed.model_copy(update={"lengths": lengths})
