"""What a training comes to: the metrics in status and manifest, and the curves."""

from __future__ import annotations

import math
from dataclasses import dataclass

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


def measured(trainer: RecipeTrainer, run: Run, best: BestAdapter | None) -> dict[str, float]:
    """The figures of the training, for status and manifest."""
    entries, steps = trainer.state.log_history, trainer.state.global_step
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    tokens = trainer.schedule.tokens(steps)
    metrics = {
        "trainLoss": run.loss,
        "finalLoss": losses[-1] if losses else run.loss,
        "trainRuntimeSeconds": run.seconds,
        "trainSteps": float(steps),
        "trainTokens": float(tokens),
        "tokensPerSecond": tokens / max(run.training_seconds, 1e-9),
    }
    evaluations = evaluations_of(trainer)
    if base := evaluations.get(0):
        metrics |= {"baseEvalLoss": base["eval_loss"], "basePerplexity": base["eval_perplexity"]}
    kept = best.best_step if best and best.best_step else steps
    if found := evaluations.get(kept):
        metrics |= {
            "evalLoss": found["eval_loss"],
            "perplexity": found["eval_perplexity"],
            "evalTokens": found["eval_tokens"],
        }
    if best:
        metrics["bestStep"] = float(kept)
    return metrics


def history(trainer: RecipeTrainer) -> list[dict[str, float]]:
    """What the Trainer logged at each step, for curves."""
    names = ("step", "epoch", "loss", "learning_rate", "grad_norm", "eval_loss")
    return [
        {name: float(entry[name]) for name in names if math.isfinite(entry.get(name, math.nan))}
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]
