"""What the training reports while it runs."""

# ruff: noqa: ARG002 - the arguments are transformers'

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from finetune_trainer.progress import Reporter


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
