"""What the training reports while it runs."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from finetune_trainer.progress import Reporter


class ProgressReport(TrainerCallback):
    """Reports each step as it ends, and the figures at each logging step."""

    # ruff: noqa: ARG002 - the arguments are transformers'

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._began = self._logged_at = time.monotonic()
        self._logged_tokens = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self._began = self._logged_at = time.monotonic()
        self._reporter.steps(0, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One optimizer step is done."""
        self._reporter.steps(state.global_step, state.max_steps, eta_seconds=self._left(state))

    def on_log(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        """The trainer logs; the last call is a summary without a loss."""
        logs = values["logs"]
        if "loss" not in logs:
            return
        now, tokens = time.monotonic(), float(logs["num_tokens"])
        rate = (tokens - self._logged_tokens) / max(now - self._logged_at, 1e-9)
        self._logged_at, self._logged_tokens = now, tokens
        self._reporter.training_step(
            state.global_step,
            state.max_steps,
            loss=float(logs["loss"]),
            learning_rate=float(logs["learning_rate"]),
            epoch=float(logs["epoch"]),
            tokens_per_second=rate,
            eta_seconds=self._left(state),
        )

    def _left(self, state: Any) -> float:
        per_step = (time.monotonic() - self._began) / max(state.global_step, 1)
        return float(per_step * (state.max_steps - state.global_step))
