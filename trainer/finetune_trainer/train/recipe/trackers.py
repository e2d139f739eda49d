"""Experiment trackers: the Trainer's own callbacks, by the names in training.reportTo.

    tensorboard   files beside the adapter
    mlflow        a server or store named by MLFLOW_TRACKING_URI
    wandb         Weights & Biases, with WANDB_API_KEY, or offline with WANDB_MODE=offline

A tracker that isn't installed ends the job before anything is trained; one that can't be reached
is left out with a warning, since no figure is worth a training. Credentials and addresses come
from the trackers' own variables.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import TYPE_CHECKING, Any

from finetune_trainer.contract import Tracker
from finetune_trainer.runtime.logs import redact

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

    from finetune_trainer.train.link.work import Work

PROJECT = "finetune-operator"  # where the tracker's own variable names none

log = logging.getLogger(__name__)


def options(work: Work) -> dict[str, Any]:
    """Arguments of the Trainer, by its names; sets what its callbacks read from the environment."""
    for name, value in _defaults(work).items():
        os.environ.setdefault(name, value)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(work.tensorboard)
    return {
        "report_to": [tracker.value for tracker in work.config.training.report_to] or "none",
        "run_name": run_name(work),
    }


def run_name(work: Work) -> str:
    """The job's name, or that of the output's folder."""
    job = work.config.job
    return job.name if job else work.config.output.uri.rstrip("/").rpartition("/")[2]


def _defaults(work: Work) -> dict[str, str]:
    return {
        "MLFLOW_EXPERIMENT_NAME": PROJECT,
        # Its own are seven tries of two minutes, during which nothing is trained.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "WANDB_PROJECT": PROJECT,
        "WANDB_DIR": str(work.room),
        "WANDB_INIT_TIMEOUT": "30",
    }


def guard(trainer: Trainer) -> None:
    """Let no tracker end the training, and none go on after it."""
    from transformers.integrations import integration_utils  # noqa: PLC0415 - not in the stage

    kinds: Any = tuple(integration_utils.INTEGRATION_TO_CALLBACK[t.value] for t in Tracker)
    callbacks: list[Any] = trainer.callback_handler.callbacks
    callbacks[:] = [_guarded(each) if isinstance(each, kinds) else each for each in callbacks]


def _guarded(tracker: Any) -> TrainerCallback:
    from transformers import TrainerCallback  # noqa: PLC0415 - not in the stage

    class Guarded(TrainerCallback):
        """Passes on every event until one fails or the training ends."""

        active = True

        def __getattribute__(self, name: str) -> Any:
            return partial(call, name) if name.startswith("on_") else super().__getattribute__(name)

    guarded = Guarded()

    def call(event: str, *args: Any, **options: Any) -> None:
        if not guarded.active:
            return
        try:
            getattr(tracker, event)(*args, **options)
            if event == "on_train_end" and (wandb := getattr(tracker, "_wandb", None)):
                wandb.finish()  # its callback leaves that to the end of the process
        except Exception as error:
            guarded.active = False
            name = type(tracker).__name__.removesuffix("Callback")
            first = redact(f"{type(error).__name__}: {error}".splitlines()[0])
            log.warning("%s fails, the training goes on without it: %.300s", name, first)
        if event == "on_train_end":
            # A figure after the end would open a run of its own.
            guarded.active = False

    return guarded
