"""What a training comes to: the metrics in status and manifest, and the curves."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune_trainer.contract import LogEntry, TrainingMetrics
from finetune_trainer.train.recipe.callbacks import BestAdapter
from finetune_trainer.train.recipe.curves import evaluations_of
from finetune_trainer.train.recipe.trainer import RecipeTrainer


@dataclass(frozen=True)
class Run:
    """What one call of the Trainer did."""

    loss: float
    """Mean of the training loss over all steps."""

    seconds: float
    """What these steps took, also those of earlier attempts."""

    training_seconds: float
    """The same without evaluations."""


def measured(trainer: RecipeTrainer, run: Run, best: BestAdapter | None) -> TrainingMetrics:
    """The figures of the training, for status and manifest."""
    entries, steps = trainer.state.log_history, trainer.state.global_step
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    tokens = trainer.schedule.tokens(steps)
    evaluations = evaluations_of(trainer)
    kept = best.best_step if best and best.best_step else steps
    base, tuned = evaluations.get(0, {}), evaluations.get(kept, {})
    return TrainingMetrics(
        train_loss=run.loss,
        final_loss=losses[-1] if losses else run.loss,
        train_runtime_seconds=run.seconds,
        train_steps=steps,
        train_tokens=tokens,
        tokens_per_second=tokens / max(run.training_seconds, 1e-9),
        base_eval_loss=base.get("eval_loss"),
        base_perplexity=base.get("eval_perplexity"),
        eval_loss=tuned.get("eval_loss"),
        perplexity=tuned.get("eval_perplexity"),
        eval_tokens=tuned.get("eval_tokens"),
        best_step=kept if best else None,
    )


def history(trainer: RecipeTrainer) -> tuple[LogEntry, ...]:
    """What the Trainer logged at each step, for curves."""
    return tuple(
        LogEntry(
            step=entry["step"],
            **{
                name: float(entry[name])
                for name in LogEntry.model_fields
                if name != "step" and math.isfinite(entry.get(name, math.nan))
            },
        )
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    )
