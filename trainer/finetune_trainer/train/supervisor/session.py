"""A training as the stage sees it: workers that come and go, and the checkpoints between them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from finetune_trainer.contract import Notice, NoticeCode, Progress, StageError, TrainingPlan
from finetune_trainer.runtime import stopping
from finetune_trainer.runtime.progress import Reporter
from finetune_trainer.train.link.channel import listening
from finetune_trainer.train.link.upload_lag import tell_stored
from finetune_trainer.train.link.work import Failed, Trained, Work
from finetune_trainer.train.supervisor.checkpoints import Checkpoint, CheckpointStore
from finetune_trainer.train.supervisor.launch import Workers
from finetune_trainer.train.supervisor.uploads import Local, Uploader

UPLOAD_SECONDS = 2.0  # kept for the upload of the last checkpoint, at least

log = logging.getLogger(__name__)


class Session:
    """Runs workers for one fingerprint. `stop` is called from another thread."""

    def __init__(self, store: CheckpointStore, reporter: Reporter) -> None:
        self.notices: list[Notice] = []
        """Whatever the training noticed, and what was done about it."""

        self._store = store
        self._reporter = reporter
        self._workers = Workers()
        self._uploader = Uploader(store)
        self._looked = False
        self._drain: Callable[[], None] = lambda: None

    @property
    def newest(self) -> Local | None:
        """The newest checkpoint on this machine, to go on from after a worker failed."""
        return self._uploader.newest

    @contextmanager
    def active(self) -> Iterator[None]:
        """While the block runs, a stop of the stage saves the last step.

        Afterwards no upload is in progress any more. When the block fails, the newest checkpoint
        is brought to the store first, for the next attempt.
        """
        try:
            with stopping.saving(self.stop):
                yield
        except Exception:
            self._uploader.finish(time.monotonic() + stopping.save_seconds())
            raise
        finally:
            self._uploader.close()

    def resume(self, work: Work) -> Work:
        """The same work from the newest checkpoint in the store on, if there is one."""
        target = work.room / "resumed"
        found = self._store.fetch_newest(target, lambda each: refusal(each, work.plan))
        local = None
        if found:
            plan = plan_after(found.plan, work.plan)
            local = Local(found.step, target, plan, found.max_sequence_length)
        self._uploader.start(local, partial(tell_stored, work.room))
        self._looked = True
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
        return going_on(work, local)

    def run_once(self, work: Work) -> Trained | Failed:
        """Run a worker to its end; raises StageError when it ended without a word."""
        if work.resume_from and self.newest and work.resume_from == self.newest.folder:
            # The plan may be another one by now, which the next attempt should begin with.
            step = self.newest.step
            self._uploader.offer(Local(step, work.resume_from, work.plan, work.max_sequence_length))

        def handle(message: dict[str, Any]) -> None:
            if fields := message.get("progress"):
                self._reporter.update(Progress.model_validate(fields))
            if notice := message.get("notice"):
                self._hear(Notice.model_validate(notice))
            if found := message.get("checkpoint"):
                folder = Path(found["folder"])
                self._uploader.offer(
                    Local(found["step"], folder, work.plan, work.max_sequence_length)
                )

        with listening(work.room, handle) as self._drain:
            ending = self._workers.run(work)
        if isinstance(ending, Failed) and ending.checkpoint and ending.step is not None:
            self._uploader.offer(
                Local(ending.step, ending.checkpoint, work.plan, work.max_sequence_length)
            )
        return ending

    def _hear(self, notice: Notice) -> None:
        # A worker that goes on sees what the one before saw.
        if notice.code not in {known.code for known in self.notices}:
            self.notice(notice)

    def notice(self, notice: Notice) -> None:
        """Keep a notice, and tell people; a worker that goes on may see the same again."""
        if notice in self.notices:
            return
        self.notices.append(notice)
        self._reporter.notice(notice)

    def stop(self, deadline: float) -> str:
        """Save the last step until the deadline; says what the next attempt begins with."""
        left = max(deadline - time.monotonic(), 0)
        upload = min(max(UPLOAD_SECONDS, 2 * self._uploader.seconds), left / 2)
        ended = self._workers.stop(deadline - upload)
        self._drain()
        step = self._uploader.finish(deadline)
        late = "" if ended else "the step that ran did not end within the grace period; "
        if step is not None:
            return f"{late}the next attempt goes on from step {step}"
        if not self._looked:
            return "the next attempt goes on from the newest checkpoint, if there is one"
        return f"{late}there is no checkpoint yet, the next attempt starts anew" if late else ""

    def clear(self) -> None:
        """The result is in the store: its checkpoints are not needed any more."""
        try:
            self._store.clear()
        except (StageError, OSError) as error:
            log.warning("Checkpoints stay in the store: %s", error)


def going_on(work: Work, local: Local) -> Work:
    """The work from a checkpoint on."""
    update = {
        "resume_from": local.folder,
        "plan": local.plan,
        "max_sequence_length": local.max_sequence_length,
    }
    return work.model_copy(update=update)


def plan_after(saved: TrainingPlan, planned: TrainingPlan) -> TrainingPlan:
    """The plan in force when the checkpoint was written, which may have been made smaller for want
    of memory; unless it is for other devices, or for larger ones than are here."""
    same = saved.parallelism == planned.parallelism and _share(saved) == _share(planned)
    recomputes = saved.gradient_checkpointing or not planned.gradient_checkpointing
    return saved if same and recomputes and saved.batch_size <= planned.batch_size else planned


def refusal(checkpoint: Checkpoint, planned: TrainingPlan) -> str | None:
    """Why a checkpoint can't be loaded with this plan: a sharded one has another format."""
    saved = checkpoint.plan.parallelism
    if saved != planned.parallelism and "fsdp" in (saved, planned.parallelism):
        return f"it was written with parallelism {saved}, and this is {planned.parallelism}"
    return None


def _share(plan: TrainingPlan) -> int:
    """Rows of a step on each device."""
    return plan.batch_size * plan.gradient_accumulation_steps
