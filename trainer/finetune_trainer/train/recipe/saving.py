"""Checkpoints, as the worker writes them: in the Trainer's own format, when they are due.

    checkpoint-40/  adapter_config.json  adapter_model.safetensors   the adapter
                    optimizer.pt  scheduler.pt  rng_state.pth        to go on bit for bit
                    trainer_state.json                               step, log, our counters

When one is due, and when the training has to wait for the store, says `lead`.

A step at the end of an epoch is saved after the epoch's evaluation, so that a resumed run neither
repeats nor misses it. What the Trainer forgets (running sums of the loss, the time, the state of
other callbacks) is kept in trainer_state.json, as `stateful_callbacks`.

Transformers loads all of it with `weights_only=True`; training_args.bin, which it would never read,
is deleted at once.
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
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.runtime.failures import explain
from finetune_trainer.runtime.units import size
from finetune_trainer.train.link.channel import Channel
from finetune_trainer.train.link.processes import is_echo
from finetune_trainer.train.link.upload_lag import Lead
from finetune_trainer.train.link.work import InterruptedTrainingError, Work

POLL_SECONDS = 0.05  # while the store is behind
FULL_BYTES = 1 << 20  # a disk with less is full
NOTHING, DUE, LAST = range(3)  # what to do after a step: go on, save, save and end

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumed:
    """Where this process took over."""

    step: int
    """Optimizer steps that were done; 0 at the beginning."""

    seconds: float
    """What the processes before took for them."""


def train(trainer: Trainer, work: Work, channel: Channel | None) -> tuple[TrainOutput, Resumed]:
    """`trainer.train`, from `work.resume_from` on, with checkpoints.

    Raises InterruptedTrainingError when it was told to stop or when memory ran out, with the
    checkpoint that could be written; StageError when the disk is full.
    """
    saving = Saving(trainer, work, channel)
    trainer.add_callback(saving)  # last, so that it sees what the others decided
    resume_from = str(work.resume_from) if work.resume_from else None
    with saving.explained():
        output = trainer.train(resume_from_checkpoint=resume_from)
    return output, saving.resumed


@dataclass(frozen=True)
class Moment:
    """What changes within a step and isn't undone when the step fails."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch_cpu: torch.Tensor
    torch_gpu: list[torch.Tensor]
    running_loss: torch.Tensor

    @classmethod
    def now(cls, trainer: Trainer) -> Moment:
        """Between two steps."""
        return cls(
            random.getstate(),
            np.random.get_state(legacy=False),
            torch.random.get_rng_state(),
            torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            trainer._tr_loss.clone(),
        )

    def bring_back(self, trainer: Trainer) -> None:
        """Undo what happened since."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.random.set_rng_state(self.torch_cpu)
        if self.torch_gpu:
            torch.cuda.set_rng_state_all(self.torch_gpu)
        trainer._tr_loss = self.running_loss.clone()


class Saving(TrainerCallback, ExportableState):
    """Decides after each step, saves, and says so; brings back what the Trainer forgets."""

    def __init__(
        self,
        trainer: Trainer,
        work: Work,
        channel: Channel | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trainer = trainer
        self._work = work
        self._channel = channel
        self._clock = clock
        self._lead = Lead(work.config.training.checkpoint_steps, work.room, clock)
        self._began = clock()
        self._told_to_stop = False
        self._in_optimizer = False
        self._saving: int | None = None
        self._moment: Moment | None = None
        self._newest: tuple[int, Path] | None = None
        self.resumed = Resumed(0, 0.0)

    def state(self) -> dict[str, Any]:
        """For trainer_state.json; the Trainer asks for it also before it begins."""
        trainer = self._trainer
        attributes = {
            "seconds": self.resumed.seconds + self._clock() - self._began,
            "running_loss": float(getattr(trainer, "_tr_loss", 0.0)),
            "total_loss": float(getattr(trainer, "_total_loss_scalar", 0.0)),
            "last_logged": int(getattr(trainer, "_globalstep_last_logged", 0)),
        }
        return {"args": {}, "attributes": attributes}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Bring back what was saved."""
        self._began = self._clock()
        self._lead.begin(state.global_step)
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
            saved = state.stateful_callbacks[type(self).__name__]["attributes"]
            self.resumed = Resumed(state.global_step, float(saved["seconds"]))
            self._bring_back(saved)

    def _bring_back(self, saved: dict[str, Any]) -> None:
        trainer = self._trainer
        trainer._tr_loss += float(saved["running_loss"])
        trainer._total_loss_scalar = float(saved["total_loss"])
        trainer._globalstep_last_logged = int(saved["last_logged"])

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The next thing is the order of the epoch's rows."""
        self._moment = Moment.now(self._trainer)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A resume in the middle of an epoch has just restored the random numbers."""
        if not float(state.epoch or 0).is_integer():
            self._moment = Moment.now(self._trainer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """From here on the adapter is neither that of one step nor of the next."""
        self._in_optimizer = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save if it is time."""
        self._in_optimizer = False
        self._moment = Moment.now(self._trainer)
        if state.global_step == self.resumed.step + 1:
            # Not earlier: a process that has nothing to save may be ended at once.
            signal.signal(signal.SIGTERM, self._on_signal)
        if not float(state.epoch).is_integer():
            self._decide(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The same for the last step of an epoch."""
        self._decide(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An evaluation may end the training early; nothing may go on from there then."""
        if control.should_training_stop and state.global_step < state.max_steps:
            control.should_save = False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A checkpoint is complete."""
        self._trainer.accelerator.wait_for_everyone()
        self._lead.written(state.global_step)
        self._saving = None
        folder = self._folder(state.global_step)
        (folder / "training_args.bin").unlink(missing_ok=True)
        self._newest = (state.global_step, folder)
        if self._channel and state.is_world_process_zero:
            self._channel.checkpoint(state.global_step, folder)
        self._wait_for_store()
        if self._agreed(LAST if self._told_to_stop else NOTHING) == LAST:
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
        if self._in_optimizer or self._moment is None:
            return None
        if self._newest and self._newest[0] == step:
            return self._newest[1]
        if step == self.resumed.step or trainer.is_fsdp_enabled or not trainer.args.should_save:
            return None
        self._moment.bring_back(trainer)
        trainer._save_checkpoint(cast("torch.nn.Module", trainer.model), trial=None)
        for callback in trainer.callback_handler.callbacks:
            if callback is not self:  # others add files of theirs
                callback.on_save(trainer.args, trainer.state, trainer.control)
        folder = self._folder(step)
        (folder / "training_args.bin").unlink(missing_ok=True)
        self._newest = (step, folder)
        return folder

    def _hand_over(self) -> None:
        """Another process has failed and may not save: what it lost is whole in the first one."""
        folder = self.save_last_step()
        if folder and self._channel:
            self._channel.checkpoint(self._trainer.state.global_step, folder)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Say in an error how far the training came."""
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
            if is_echo(error):
                self._hand_over()
            full = failure.reason is Reason.OUT_OF_DISK or self._is_disk_full()
            if self._saving is not None and full:
                # What was begun gives back the room that the error itself needs to be told.
                shutil.rmtree(self._folder(self._saving), ignore_errors=True)
                raise self._disk_full() from error
            raise
        finally:
            signal.signal(signal.SIGTERM, before)

    def _wait_for_store(self) -> None:
        """No step more than an interval ahead of the store; a stop ends the wait."""
        began = self._clock()
        while self._lead.is_whole() and not self._told_to_stop:
            time.sleep(POLL_SECONDS)
        if (waited := self._clock() - began) > 1:
            log.info("Waited %.0f s for the upload of an earlier checkpoint", waited)

    def _decide(self, state: Any, control: Any) -> None:
        due = DUE if self._lead.is_due(state.global_step) else NOTHING
        wish = self._agreed(LAST if self._told_to_stop else due)
        self._told_to_stop = wish == LAST
        if wish == NOTHING or (control.should_training_stop and wish == DUE):
            return  # at its end, the training leaves its result
        control.should_save = True
        self._saving = state.global_step

    def _agreed(self, wish: int) -> int:
        """The strongest wish of all processes, whose clocks and signals differ."""
        if self._trainer.args.world_size == 1:
            return wish
        tensor = torch.tensor([wish], device=self._trainer.args.device)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return int(tensor.item())

    def _on_signal(self, *_: Any) -> None:
        self._told_to_stop = True

    def _folder(self, step: int) -> Path:
        return self._work.checkpoints / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def _is_disk_full(self) -> bool:
        """torch.save says no more than "iostream error"."""
        return shutil.disk_usage(self._work.room).free < FULL_BYTES

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
