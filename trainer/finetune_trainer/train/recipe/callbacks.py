"""What the Trainer calls while it runs: progress, early stopping, and the watch over the curves."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from finetune_trainer.contract import (
    EarlyStopping,
    Notice,
    NoticeCode,
    Reason,
    StageError,
    Training,
)
from finetune_trainer.runtime.progress import Reporter
from finetune_trainer.train.recipe.curves import is_finite, points
from finetune_trainer.train.recipe.diagnosis import diagnose, not_finite_notice

# ruff: noqa: ARG002 - the arguments are transformers'


class ProgressReport(TrainerCallback):
    """Reports each step as it ends, the figures at each logging step, and evaluations."""

    def __init__(self, reporter: Reporter, tokens: Callable[[int], int]) -> None:
        self._reporter = reporter
        self._tokens = tokens  # non-padding tokens of so many steps
        self._began = self._logged_at = time.monotonic()
        self._began_step = self._logged_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock; after a resume not at step 0."""
        self._restart(state.global_step)
        self._began, self._began_step = self._logged_at, state.global_step
        self._reporter.steps(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One optimizer step is done."""
        self._reporter.steps(state.global_step, state.max_steps, eta_seconds=self._left(state))

    def on_log(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        """The trainer logs; evaluations and the summary at the end have no loss."""
        logs = values["logs"]
        if "loss" not in logs:
            return
        tokens = self._tokens(state.global_step) - self._tokens(self._logged_step)
        rate = tokens / max(time.monotonic() - self._logged_at, 1e-9)
        self._restart(state.global_step)
        self._reporter.training_step(
            state.global_step,
            state.max_steps,
            loss=float(logs["loss"]),
            learning_rate=float(logs["learning_rate"]),
            epoch=float(logs["epoch"]),
            tokens_per_second=rate,
            eta_seconds=self._left(state),
        )

    def on_evaluate(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        """The held-out rows have been evaluated; that time is none of the training's."""
        metrics = values["metrics"]
        self._reporter.evaluation(state.global_step, float(metrics["eval_loss"]))
        seconds = float(metrics["eval_runtime"])
        self._logged_at, self._began = self._logged_at + seconds, self._began + seconds

    def _restart(self, step: int) -> None:
        self._logged_at, self._logged_step = time.monotonic(), step

    def _left(self, state: Any) -> float:
        done = max(state.global_step - self._began_step, 1)
        per_step = (time.monotonic() - self._began) / done
        return float(per_step * (state.max_steps - state.global_step))


# ruff: noqa: ARG002 - the arguments are transformers'


BEST = "best_adapter.safetensors"  # in a checkpoint's folder

log = logging.getLogger(__name__)


class BestAdapter(TrainerCallback, ExportableState):
    """Keeps the adapter of the evaluation with the lowest loss.

    The base model (step 0) is no candidate: an adapter that changes nothing is none. The weights
    are held in memory (on the CPU) and go into every checkpoint. With fsdp each process keeps its
    own part in memory only; after a resume the search for the best begins anew there.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        settings: EarlyStopping,
        notify: Callable[[Notice], None] | None,
        resume_from: Path | None = None,
    ) -> None:
        self._model = model
        self._settings = settings
        self._notify = notify
        self._resume_from = resume_from
        self._weights: dict[str, torch.Tensor] = {}
        self.best_loss, self.best_step, self.without_gain = math.inf, 0, 0

    def state(self) -> dict[str, Any]:
        """For trainer_state.json, from where it comes back after a resume."""
        names = ("best_loss", "best_step", "without_gain")
        found = {name: getattr(self, name) for name in names}
        # JSON has no infinity.
        return {"args": {}, "attributes": found if self.best_step else {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Fetch the best weights so far."""
        file = self._resume_from / BEST if self._resume_from else None
        if file and file.exists():
            self._weights = load_file(file)

    def on_evaluate(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        """Compare, and stop after as many evaluations without gain as the spec allows."""
        step, loss = state.global_step, float(values["metrics"]["eval_loss"])
        if step in (0, self.best_step):
            return
        if self.best_step and not self._weights:
            self.best_loss, self.best_step = math.inf, 0  # resumed without them
        gained = loss < self.best_loss - self._settings.min_delta
        self.without_gain = 0 if gained else self.without_gain + 1
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, step
            self._weights = {name: _copy(p) for name, p in self._trained()}
        if self.without_gain >= self._settings.patience and step < state.max_steps:
            control.should_training_stop = True
            self._say(step, state.max_steps, loss)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add the best weights to the checkpoint."""
        whole = all(type(value) is torch.Tensor for value in self._weights.values())
        if self._weights and whole and state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            save_file(self._weights, folder / BEST)

    def restore(self, last_step: int) -> None:
        """Put the best weights back into the model."""
        if not self._weights or self.best_step == last_step:
            return
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(self._weights[name])
        log.info("The adapter of step %d is kept (loss %.4f)", self.best_step, self.best_loss)

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]

    def _say(self, step: int, steps: int, loss: float) -> None:
        if self._notify is None:
            return
        self._notify(
            Notice(
                code=NoticeCode.EARLY_STOPPED,
                step=step,
                evidence=f"the loss on the held-out rows is {loss:.4f} at step {step} of {steps}, "
                f"and was {self.best_loss:.4f} at step {self.best_step}: "
                f"{self.without_gain} evaluations without a gain",
                remedy=f"The training stopped, and the adapter of step {self.best_step} is kept.",
            )
        )


def _copy(parameter: torch.nn.Parameter) -> torch.Tensor:
    return parameter.detach().to("cpu", copy=True)


# ruff: noqa: ARG002 - the arguments are transformers'


BAD_UPDATES = 3  # in a row
GROWTH = 50  # a log that has grown by a fiftieth is looked at again; its cost stays linear


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
