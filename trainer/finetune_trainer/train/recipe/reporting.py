"""Who hears of a training while it runs: the stage, for status and log, and experiment trackers.

Trackers are the Trainer's own callbacks, by the names in training.reportTo:

    tensorboard   files beside the adapter
    mlflow        a server or store named by MLFLOW_TRACKING_URI
    wandb         Weights & Biases, with WANDB_API_KEY, or offline with WANDB_MODE=offline

A tracker that isn't installed ends the job before anything is trained. One that can't be reached
is left out with a warning, since no figure is worth a training. Credentials and addresses come
from the trackers' own variables.
"""

# ruff: noqa: ARG002 - the arguments are transformers'

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from finetune_trainer.contract import RunConfig, Tracker
from finetune_trainer.contract.base import redact
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.train.link import TrainingWork
from finetune_trainer.train.recipe.training_log import REWARDS

PROJECT = "finetune-operator"  # where the tracker's own variable names none

log = logging.getLogger(__name__)


class ProgressReport(TrainerCallback):
    """Reports each step as it ends, the figures at each logging step, and evaluations."""

    def __init__(self, reporter: Reporter, tokens: Callable[[int], int]) -> None:
        self._reporter = reporter
        self._tokens = tokens  # non-padding tokens of so many steps
        self._began = self._logged_at = time.monotonic()
        self._began_step = self._logged_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock. After a resume it is not step 0."""
        self._restart(state.global_step)
        self._began, self._began_step = self._logged_at, state.global_step
        self._reporter.steps(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._reporter.steps(
            state.global_step, state.max_steps, eta_seconds=self._seconds_left(state)
        )

    def on_log(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        """Report the figures. Evaluations and the summary at the end have no loss."""
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
            eta_seconds=self._seconds_left(state),
        )

    def on_evaluate(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        """Report an evaluation. Its time counts neither for the rate nor for the time left."""
        metrics = values["metrics"]
        rewards = {name: metrics.get(key) for name, key in REWARDS.items()}
        self._reporter.evaluation(state.global_step, float(metrics["eval_loss"]), **rewards)
        seconds = float(metrics["eval_runtime"])
        self._logged_at, self._began = self._logged_at + seconds, self._began + seconds

    def _restart(self, step: int) -> None:
        self._logged_at, self._logged_step = time.monotonic(), step

    def _seconds_left(self, state: Any) -> float:
        done = max(state.global_step - self._began_step, 1)
        per_step = (time.monotonic() - self._began) / done
        return float(per_step * (state.max_steps - state.global_step))


def set_tracker_variables(work: TrainingWork) -> None:
    """Set what the trackers' callbacks read from the environment; what the user set stays."""
    defaults = {
        "MLFLOW_EXPERIMENT_NAME": PROJECT,
        # MLflow's defaults are seven tries of two minutes, and the training waits for them.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "WANDB_PROJECT": PROJECT,
        "WANDB_DIR": str(work.workdir),
        "WANDB_INIT_TIMEOUT": "30",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(work.tensorboard)


def run_name(config: RunConfig) -> str:
    """The job's name, or that of the output's folder."""
    return config.job.name if config.job else config.output.uri.rstrip("/").rpartition("/")[2]


def guard_trackers(trainer: Trainer) -> None:
    """Let no tracker end the training, and none go on after it."""
    kinds: Any = tuple(INTEGRATION_TO_CALLBACK[tracker.value] for tracker in Tracker)
    callbacks: list[Any] = trainer.callback_handler.callbacks
    callbacks[:] = [
        GuardedTracker(callback) if isinstance(callback, kinds) else callback
        for callback in callbacks
    ]


class GuardedTracker(TrainerCallback):
    """Passes a tracker the events that it listens to, until one fails or the training ends."""

    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker
        self._active = True

    def on_train_begin(self, *args: Any, **values: Any) -> None:
        self._pass_on(self._tracker.on_train_begin, args, values)

    def on_log(self, *args: Any, **values: Any) -> None:
        self._pass_on(self._tracker.on_log, args, values)

    def on_save(self, *args: Any, **values: Any) -> None:
        self._pass_on(self._tracker.on_save, args, values)

    def on_train_end(self, *args: Any, **values: Any) -> None:
        self._pass_on(self._tracker.on_train_end, args, values)
        if wandb := getattr(self._tracker, "_wandb", None):
            # Its callback leaves that to the end of the process.
            self._pass_on(wandb.finish, (), {})
        self._active = False  # a figure after the end would open a run of its own

    def _pass_on(
        self, event: Callable[..., Any], args: tuple[Any, ...], values: dict[str, Any]
    ) -> None:
        if not self._active:
            return
        try:
            event(*args, **values)
        except Exception as error:
            self._active = False
            name = type(self._tracker).__name__.removesuffix("Callback")
            first = redact(f"{type(error).__name__}: {error}".splitlines()[0])
            log.warning("%s fails, the training goes on without it: %.300s", name, first)
