"""Watches the training: sends each sign of the diagnosis once, and ends what has diverged.

An update whose gradient is NaN or infinite is left out, as a gradient scaler does: one row may
overflow, and the weights stay good. Three in a row are no chance, and the training ends.
"""

# ruff: noqa: ARG002 - the arguments are transformers'

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from finetune_trainer.config import Training
from finetune_trainer.outcome import Notice, Reason, StageError
from finetune_trainer.train.curves import is_finite, points
from finetune_trainer.train.diagnosis import diagnose, not_finite_notice

BAD_UPDATES = 3  # in a row
GROWTH = 50  # a log that has grown by a fiftieth is looked at again; its cost stays linear

log = logging.getLogger(__name__)


class Watch(TrainerCallback):
    """Needs no state of its own after a resume: the Trainer's log has all that it looks at."""

    def __init__(self, notify: Callable[[Notice], None] | None, settings: Training) -> None:
        self._notify = notify
        self._settings = settings
        self._sent: set[str] = set()
        self._next_look = 0
        self._bad: list[int] = []  # steps in a row whose update was left out
        self._good = False  # whether any update was made

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Leave out an update that would ruin the weights; raises StageError at the third."""
        optimizer = objects["optimizer"]
        norm = gradient_norm(optimizer)
        if norm is None or torch.isfinite(norm):
            self._bad, self._good = [], True
            return
        for parameter in _parameters(optimizer):
            parameter.grad = None
        self._bad.append(state.global_step + 1)
        log.warning("step %d: the gradient is not finite, so it is left out", self._bad[-1])
        self._send(self._not_finite(state))
        if len(self._bad) == BAD_UPDATES:
            raise self._diverged(state)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at the curves."""
        lines = len(state.log_history)
        if self._notify is None or lines < self._next_look:
            return
        self._next_look = lines + 1 + lines // GROWTH
        self._look(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look once more; raises StageError when not one update could be made."""
        if self._bad and not self._good:
            raise self._diverged(state)
        self._look(state)

    def _look(self, state: Any) -> None:
        for notice in diagnose(points(state.log_history), self._settings):
            self._send(notice)

    def _send(self, notice: Notice) -> None:
        if self._notify is not None and notice.code not in self._sent:
            self._sent.add(notice.code)
            self._notify(notice)

    def _not_finite(self, state: Any) -> Notice:
        good = self._good or bool(state.global_step >= BAD_UPDATES)
        evidence = f"the gradient is NaN or infinite at step {', '.join(map(str, self._bad))}"
        losses = [point for point in points(state.log_history) if is_finite(point.loss)]
        if losses and good:  # the Trainer logs 0 for a loss that never was a number
            evidence += f"; loss {losses[-1].loss:.3g} at step {losses[-1].step}"
        evidence += "; the update is left out"
        return not_finite_notice(self._bad[-1], evidence, self._settings, finite_before=good)

    def _diverged(self, state: Any) -> StageError:
        notice = self._not_finite(state)
        return StageError(
            Reason.TRAINING_DIVERGED, f"The training has diverged: {notice.text}", notices=(notice,)
        )


def gradient_norm(optimizer: Any) -> torch.Tensor | None:
    """Norm over all gradients, the same in every process; None where there are no gradients."""
    gradients = [p.grad for p in _parameters(optimizer) if p.grad is not None]
    if not gradients:
        return None
    norm = torch.nn.utils.get_total_norm(gradients)
    # With fsdp a process has only its part of each gradient.
    whole = getattr(norm, "full_tensor", None)
    return whole() if whole else norm


def _parameters(optimizer: Any) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
