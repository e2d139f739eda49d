"""Checkpoints as the worker writes them: in the Trainer's own format, when they are due.

    checkpoint-40/  adapter_config.json  adapter_model.safetensors   the adapter
                    weights.safetensors                              or all weights (full)
                    optimizer.pt  scheduler.pt  rng_state.pth        to go on bit for bit
                    trainer_state.json                               step, log, our counters

The stage says which one is in the store. So the training runs ahead of the store by one interval,
and no further:

    step      0 ------- 5 ------- 10 ------- 15        checkpointSteps: 10
    written             5         10         15        every half interval
    stored                        5          10        each has the other half for its upload

A kill at any moment costs one interval at most. Where the store is slower than that, the training
waits for it. A checkpoint that the store refuses counts as done, with a warning, so that an outage
doesn't stop the training: only then may a kill cost more.

A step at the end of an epoch is saved after the epoch's evaluation, so that a resumed run neither
repeats nor misses it. What the Trainer forgets (running sums of the loss, the time, the state of
other callbacks) is kept in trainer_state.json, as `stateful_callbacks`.

Transformers loads all of it with `weights_only=True`. It would never read training_args.bin, which
is a pickle, so that file is deleted at once.
"""

# ruff: noqa: ARG002 - the arguments are transformers'

from __future__ import annotations

import logging
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.runtime import size
from finetune_trainer.runtime.lifecycle import explain
from finetune_trainer.train.link import Channel, InterruptedTrainingError, TrainingWork
from finetune_trainer.train.recipe.training_log import LossSums

INTERVAL_SECONDS = 600.0  # where training.checkpointSteps is left out
FULL_INTERVAL_SECONDS = 3600.0  # of all weights, whose checkpoints are large
WAIT_SECONDS = 0.2  # at most, between two looks at a store that is behind
FULL_BYTES = 1 << 20  # a disk with less is full

log = logging.getLogger(__name__)


class AfterStep(IntEnum):
    """What to do after a step. The processes of a training agree on the highest number."""

    GO_ON = 0
    SAVE = 1
    WAIT = 2
    SAVE_AND_END = 3


@dataclass(frozen=True)
class ResumePoint:
    """Where this process took over."""

    step: int
    """Optimizer steps that were done; 0 at the beginning."""

    seconds: float
    """What the processes before took for them."""


def train_with_checkpoints(
    trainer: Trainer, work: TrainingWork, channel: Channel | None
) -> tuple[TrainOutput, ResumePoint]:
    """`trainer.train`, from `work.resume_from` on, with checkpoints.

    Raises InterruptedTrainingError when it was told to stop or when memory ran out, with the
    checkpoint that could be written; StageError when the disk is full.
    """
    saver = CheckpointSaver(trainer, work, channel)
    trainer.add_callback(saver)  # last, so that it sees what the others decided
    resume_from = str(work.resume_from) if work.resume_from else None
    with saver.explaining_errors():
        output = trainer.train(resume_from_checkpoint=resume_from)
    return output, saver.resumed


@dataclass(frozen=True)
class StepState:
    """What changes within a step and isn't undone when the step fails."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch_cpu: torch.Tensor
    torch_gpu: list[torch.Tensor]
    running_loss: torch.Tensor
    """Private in the Trainer, which adds each pass to it at once."""

    @classmethod
    def now(cls, trainer: Trainer) -> StepState:
        """Between two steps."""
        return cls(
            random.getstate(),
            np.random.get_state(legacy=False),
            torch.random.get_rng_state(),
            torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            trainer._tr_loss.clone(),
        )

    def put_back(self, trainer: Trainer) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.random.set_rng_state(self.torch_cpu)
        if self.torch_gpu:
            torch.cuda.set_rng_state_all(self.torch_gpu)
        trainer._tr_loss = self.running_loss.clone()


@dataclass(frozen=True)
class WrittenCheckpoint:
    """A checkpoint on disk."""

    step: int
    at: float
    """When it was written: in steps, or in seconds on the clock."""


class UploadLag:
    """The checkpoints on disk, from the newest one in the store on."""

    def __init__(
        self,
        steps: int | None,
        stored_step: Callable[[], int | None],
        clock: Callable[[], float] = time.monotonic,
        seconds: float = INTERVAL_SECONDS,
    ) -> None:
        """An interval is so many steps, or so many seconds where they are left out."""
        self._steps = steps
        self._stored_step = stored_step
        self._clock = clock
        self._interval = float(steps) if steps else seconds
        self._half = float(max(steps // 2, 1)) if steps else seconds / 2
        self._written: list[WrittenCheckpoint] = []
        self.start_from(0)

    def start_from(self, step: int) -> None:
        """The training begins, or goes on, with so many steps done."""
        stored = self._stored_step()
        self._written = [self._now(step)]
        if stored is not None and stored < step:  # a worker failed, and its last step is on disk
            self._written.insert(0, self._now(stored))

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint of this step should be written."""
        now = self._now(step).at
        return now - self._written[-1].at >= self._half or now - self._stored_at() >= self._interval

    def add_written(self, step: int) -> None:
        self._written.append(self._now(step))

    def must_wait(self) -> bool:
        """Whether the disk is an interval ahead of the store: no further step may begin."""
        return len(self._written) > 1 and self._written[-1].at - self._stored_at() >= self._interval

    def _stored_at(self) -> float:
        """When the newest checkpoint in the store was written. Forgets those before it."""
        stored = self._stored_step()
        newest = self._written[-1].step if stored is None else stored
        while len(self._written) > 1 and self._written[1].step <= newest:
            self._written.pop(0)
        return self._written[0].at

    def _now(self, step: int) -> WrittenCheckpoint:
        return WrittenCheckpoint(step, float(step) if self._steps else self._clock())


class CheckpointSaver(TrainerCallback, ExportableState):
    """Decides after each step whether to save, and brings back what the Trainer forgets."""

    def __init__(
        self,
        trainer: Trainer,
        work: TrainingWork,
        channel: Channel | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trainer = trainer
        self._work = work
        self._channel = channel
        self._clock = clock
        stored_step = channel.stored_step if channel else lambda: None
        settings = work.config.training
        seconds = FULL_INTERVAL_SECONDS if settings.method == "full" else INTERVAL_SECONDS
        self._lag = UploadLag(settings.checkpoint_steps, stored_step, clock, seconds)
        self._began = clock()
        self._stop_requested = False
        self._in_optimizer = False
        self._saving: int | None = None
        self._before_step: StepState | None = None
        self._newest: tuple[int, Path] | None = None
        self.resumed = ResumePoint(0, 0.0)

    def state(self) -> dict[str, Any]:
        """For trainer_state.json. The Trainer asks for it also before it begins."""
        seconds = self.resumed.seconds + self._clock() - self._began
        return {
            "args": {},
            "attributes": {"seconds": seconds, **vars(LossSums.of(self._trainer))},
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Bring back what was saved."""
        self._began = self._clock()
        self._lag.start_from(state.global_step)
        exportable = [*self._trainer.callback_handler.callbacks, control]
        for callback in exportable:
            if not isinstance(callback, ExportableState):
                continue
            name = type(callback).__name__
            known = state.stateful_callbacks.setdefault(name, callback.state())
            if state.global_step and callback not in (self, control):
                for key, value in known.get("attributes", {}).items():
                    setattr(callback, key, value)
        if self._work.resume_from and state.global_step:
            self._newest = (state.global_step, self._work.resume_from)
            # Intervals may have been changed since: they don't decide on the result.
            state.compute_steps(args, state.max_steps)
            saved = dict(state.stateful_callbacks[type(self).__name__]["attributes"])
            self.resumed = ResumePoint(state.global_step, float(saved.pop("seconds")))
            LossSums(**saved).put_back(self._trainer)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remember the random numbers before the epoch's rows are shuffled."""
        self._before_step = StepState.now(self._trainer)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remember them where a resume in the middle of an epoch has just restored them."""
        if not float(state.epoch or 0).is_integer():
            self._before_step = StepState.now(self._trainer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """From here on the adapter is neither that of one step nor of the next."""
        self._in_optimizer = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save if it is time."""
        self._in_optimizer = False
        self._before_step = StepState.now(self._trainer)
        if state.global_step == self.resumed.step + 1:
            # Not earlier: a process that has nothing to save may be ended at once.
            signal.signal(signal.SIGTERM, self._on_signal)
        if not float(state.epoch).is_integer():
            self._decide(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The same for the last step of an epoch."""
        self._decide(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save nothing where an evaluation ends the training: no attempt may go on from there."""
        if control.should_training_stop and state.global_step < state.max_steps:
            control.should_save = False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A checkpoint is complete: report it, and wait where the store is behind."""
        self._trainer.accelerator.wait_for_everyone()
        self._lag.add_written(state.global_step)
        self._saving = None
        folder = self._finished_folder(state.global_step)
        if self._channel and state.is_world_process_zero:
            self._channel.checkpoint(state.global_step, folder)
        if self._wait_for_store() is AfterStep.SAVE_AND_END:
            raise InterruptedTrainingError(
                StageError(Reason.STOPPED, "Stopped by a signal."), state.global_step, folder
            )

    def save_last_step(self) -> Path | None:
        """Write the last complete step after an error in the middle of the next one.

        A failed forward or backward pass leaves adapter and optimizer as they were. None when the
        optimizer itself failed, when there is no complete step, or when the other processes of a
        sharded training would have to take part.
        """
        trainer, step = self._trainer, self._trainer.state.global_step
        if self._in_optimizer or self._before_step is None:
            return None
        if self._newest and self._newest[0] == step:
            return self._newest[1]
        if step == self.resumed.step or trainer.is_fsdp_enabled or not trainer.args.should_save:
            return None
        self._before_step.put_back(trainer)
        # Publicly the Trainer saves from within its loop only, which the error has left.
        trainer._save_checkpoint(cast("torch.nn.Module", trainer.model), trial=None)
        for callback in trainer.callback_handler.callbacks:
            if callback is not self:  # others add files of theirs
                callback.on_save(trainer.args, trainer.state, trainer.control)
        return self._finished_folder(step)

    @contextmanager
    def explaining_errors(self) -> Iterator[None]:
        """Say in an error how far the training came, and save what can be saved."""
        before = signal.getsignal(signal.SIGTERM)
        try:
            yield
        except InterruptedTrainingError:
            raise
        except Exception as error:
            failure = explain(error)
            if failure.reason is Reason.OUT_OF_GPU_MEMORY:
                step = self._trainer.state.global_step
                raise InterruptedTrainingError(failure, step, self.save_last_step()) from error
            full = failure.reason is Reason.OUT_OF_DISK or self._is_disk_full()
            if self._saving is not None and full:
                # Half a checkpoint makes way for what the error itself needs on the disk.
                shutil.rmtree(self._folder(self._saving), ignore_errors=True)
                raise self._disk_full() from error
            raise
        finally:
            signal.signal(signal.SIGTERM, before)

    def _wait_for_store(self) -> AfterStep:
        """Let no step begin that is more than an interval ahead of the store, unless at a stop."""
        began, agreed = self._clock(), AfterStep.WAIT
        while agreed is AfterStep.WAIT:
            wish = AfterStep.WAIT if self._lag.must_wait() else AfterStep.GO_ON
            agreed = self._agree(AfterStep.SAVE_AND_END if self._stop_requested else wish)
            if agreed is AfterStep.WAIT and self._channel:
                self._channel.alive()  # it is the store that is slow
                self._channel.stored_step(WAIT_SECONDS)
        if (waited := self._clock() - began) > 1:
            log.info("Waited %.0f s for the upload of an earlier checkpoint", waited)
        return agreed

    def _decide(self, state: Any, control: Any) -> None:
        due = AfterStep.SAVE if self._lag.is_due(state.global_step) else AfterStep.GO_ON
        agreed = self._agree(AfterStep.SAVE_AND_END if self._stop_requested else due)
        self._stop_requested = agreed is AfterStep.SAVE_AND_END
        if agreed is AfterStep.GO_ON or (control.should_training_stop and agreed is AfterStep.SAVE):
            return  # at its end, the training leaves its result
        control.should_save = True
        self._saving = state.global_step

    def _agree(self, wish: AfterStep) -> AfterStep:
        """The strongest wish of all processes, whose clocks and signals differ."""
        if self._trainer.args.world_size == 1:
            return wish
        tensor = torch.tensor([int(wish)], device=self._trainer.args.device)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return AfterStep(int(tensor.item()))

    def _on_signal(self, *_: Any) -> None:
        self._stop_requested = True

    def _folder(self, step: int) -> Path:
        return self._work.checkpoints / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def _finished_folder(self, step: int) -> Path:
        folder = self._folder(step)
        (folder / "training_args.bin").unlink(missing_ok=True)
        self._newest = (step, folder)
        return folder

    def _is_disk_full(self) -> bool:
        # torch.save says no more than "iostream error".
        return shutil.disk_usage(self._work.workdir).free < FULL_BYTES

    def _disk_full(self) -> StageError:
        newest = self._newest[1] if self._newest else None
        files = newest.rglob("*") if newest else ()
        needed = sum(file.stat().st_size for file in files if file.is_file())
        takes = f" of {size(needed)}" if needed else ""
        return StageError(
            Reason.OUT_OF_DISK,
            f"The disk is full: the checkpoint of step {self._saving} can't be written. Give the "
            f"training's pod more ephemeral storage: three checkpoints{takes} have to fit beside "
            "the base model.",
        )
