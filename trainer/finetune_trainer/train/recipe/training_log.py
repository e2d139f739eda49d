"""The Trainer's log: who hears of it while it trains, and what it is in the end.

The stage hears of it, for status and log, and so do experiment trackers. Later it is curves that
can be judged, metrics, and the history in the store. Trackers are the Trainer's own callbacks, by
the names in training.reportTo:

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
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from finetune_trainer.contract import LogEntry, RunConfig, Tracker, TrainingMetrics
from finetune_trainer.contract.base import redact
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.train.link import TrainingWork

if TYPE_CHECKING:
    from finetune_trainer.train.recipe.trainer import RecipeTrainer

log = logging.getLogger(__name__)

# --- As curves, metrics and history --------------------------------------------------------------

BINS = 32
"""A curve is reduced to so many bins (medians), so that 50 or 50,000 log lines are judged alike."""


REWARDS = {
    "reward_accuracy": "eval_rewards/accuracies",
    "reward_margin": "eval_rewards/margins",
}
"""Our names of what an evaluation of preferences logs by TRL's names."""


@dataclass(frozen=True)
class LogPoint:
    """A line of the Trainer's log."""

    step: int
    epoch: float
    loss: float | None = None
    """Mean since the line before."""

    grad_norm: float | None = None
    learning_rate: float | None = None
    eval_loss: float | None = None
    """Mean over the held-out rows."""

    reward_accuracy: float | None = None
    reward_margin: float | None = None
    """Of preferences, over the held-out rows."""


def log_points(log_history: Iterable[Mapping[str, Any]]) -> list[LogPoint]:
    """The Trainer's `state.log_history` without its summaries."""
    names = {name: name for name in ("loss", "grad_norm", "learning_rate", "eval_loss")} | REWARDS
    return [
        LogPoint(
            step=int(entry["step"]),
            epoch=float(entry.get("epoch") or 0.0),
            **{n: float(entry[key]) for n, key in names.items() if entry.get(key) is not None},
        )
        for entry in log_history
        if "loss" in entry or "eval_loss" in entry
    ]


def binned_losses(train: Sequence[LogPoint]) -> list[tuple[int, float]]:
    """The losses as at most BINS medians, each with the last step of its bin."""
    size = math.ceil(len(train) / BINS)
    # Full bins up to the end: the newest lines matter most, and the first bin may be smaller.
    cuts = list(range(len(train) % size or size, len(train) + 1, size)) if size else []
    bins = [train[max(end - size, 0) : end] for end in cuts]
    return [(bin_[-1].step, median(loss_of(p) for p in bin_)) for bin_ in bins]


def noise_of(values: Sequence[float]) -> float:
    """Standard deviation of the noise, from the differences of neighbours: a trend hardly counts.

    For normal noise the mean of |difference| is 2/sqrt(pi) standard deviations.
    """
    if len(values) < 2:
        return 0.0
    return fmean(abs(b - a) for a, b in pairwise(values)) * math.sqrt(math.pi) / 2


@dataclass(frozen=True)
class EpochBlock:
    """Neighbouring log lines that span an epoch or a little more."""

    first_step: int
    last_step: int
    epoch: float
    """Where it ends."""

    loss: float
    """Mean over its steps."""

    rate: float | None
    """Mean learning rate."""


def epoch_blocks(train: Sequence[LogPoint]) -> list[EpochBlock]:
    """The curve in blocks of whole log lines, each at least an epoch long."""
    blocks: list[EpochBlock] = []
    lines: list[tuple[int, LogPoint]] = []  # steps of each line
    began, step = 0.0, 0
    for point in train:
        lines.append((max(point.step - step, 1), point))
        step = point.step
        if point.epoch - began >= 1 - 1e-6:
            steps = sum(count for count, _ in lines)
            rates = [p.learning_rate for _, p in lines if p.learning_rate is not None]
            blocks.append(
                EpochBlock(
                    first_step=lines[0][1].step,
                    last_step=point.step,
                    epoch=point.epoch,
                    loss=sum(count * loss_of(p) for count, p in lines) / steps,
                    rate=fmean(rates) if rates else None,
                )
            )
            lines, began = [], point.epoch
    return blocks


def is_finite(value: float | None) -> bool:
    """Whether there is a value, and a finite one."""
    return value is not None and math.isfinite(value)


def loss_of(point: LogPoint) -> float:
    """The training loss of a point that has one."""
    assert point.loss is not None, "points with a loss only"  # noqa: S101
    return point.loss


def eval_loss_of(point: LogPoint) -> float:
    """The held-out loss of a point that has one."""
    assert point.eval_loss is not None, "points with an eval loss only"  # noqa: S101
    return point.eval_loss


def evaluations_of(trainer: RecipeTrainer) -> dict[int, dict[str, float]]:
    """Step -> what the evaluation there found. Step 0 is the base model."""
    entries = trainer.state.log_history
    return {int(entry["step"]): entry for entry in entries if "eval_loss" in entry}


@dataclass(frozen=True)
class TrainingTotals:
    """What the whole training took, also over several processes one after the other."""

    loss: float
    """Mean of the training loss over all steps."""

    seconds: float
    training_seconds: float
    """The same without evaluations."""


def training_metrics(
    trainer: RecipeTrainer, totals: TrainingTotals, best_step: int | None
) -> TrainingMetrics:
    """The figures for status and manifest. `best_step` is the step whose adapter is kept."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    steps = trainer.state.global_step
    tokens = trainer.schedule.tokens(steps)
    evaluations = evaluations_of(trainer)
    base, tuned = evaluations.get(0, {}), evaluations.get(best_step or steps, {})
    return TrainingMetrics(
        train_loss=totals.loss,
        final_loss=losses[-1] if losses else totals.loss,
        train_runtime_seconds=totals.seconds,
        train_steps=steps,
        train_tokens=tokens,
        tokens_per_second=tokens / max(totals.training_seconds, 1e-9),
        base_eval_loss=base.get("eval_loss"),
        base_perplexity=base.get("eval_perplexity"),
        eval_loss=tuned.get("eval_loss"),
        perplexity=tuned.get("eval_perplexity"),
        eval_tokens=tuned.get("eval_tokens"),
        **{name: tuned.get(key) for name, key in REWARDS.items()},
        **{f"base_{name}": base.get(key) for name, key in REWARDS.items()},
        best_step=best_step,
    )


def begin_memory_peaks() -> None:
    """Forget what this process held of the GPU's memory before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def memory_peaks(predicted: int | None) -> dict[str, float]:
    """What the training held at most, and what was predicted: figures of TrainingMetrics."""
    found: dict[str, float] = {"predicted_memory_bytes": predicted} if predicted else {}
    if torch.cuda.is_available():
        found["peak_memory_bytes"] = torch.cuda.max_memory_reserved()
        found["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
    else:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
        if peaks:  # not every kernel tells
            found["peak_memory_bytes"] = peaks[0]
    return found


def history(trainer: RecipeTrainer) -> tuple[LogEntry, ...]:
    """What the Trainer logged at each step, without figures that are not finite."""
    points = [asdict(point) for point in log_points(trainer.state.log_history)]
    return tuple(
        LogEntry(**{name: value for name, value in point.items() if is_finite(value)})
        for point in points
    )


@dataclass(frozen=True)
class LossSums:
    """The Trainer's sums of the loss, which its checkpoints leave out.

    It has them in private attributes only. Without them the loss at the first logging step after a
    resume would be the mean of the steps since the resume, and the total would miss all before it.
    """

    running_loss: float
    """Sum since the last logging step."""

    total_loss: float
    """Sum of all steps up to the last logging step."""

    last_logged: int
    """The last logging step."""

    @classmethod
    def of(cls, trainer: Trainer) -> LossSums:
        """Before the training begins there are none."""
        return cls(
            float(getattr(trainer, "_tr_loss", 0.0)),
            float(getattr(trainer, "_total_loss_scalar", 0.0)),
            int(getattr(trainer, "_globalstep_last_logged", 0)),
        )

    def put_back(self, trainer: Trainer) -> None:
        trainer._tr_loss += self.running_loss
        trainer._total_loss_scalar = self.total_loss
        trainer._globalstep_last_logged = self.last_logged


# --- To the stage and to trackers ----------------------------------------------------------------

PROJECT = "finetune-operator"  # where the tracker's own variable names none


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
