"""metrics.json: what a training leaves beside its adapter, for the export and for people."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, JsonValue

from finetune_trainer.contract.base import Base
from finetune_trainer.contract.progress import Notice


class TrainingMetrics(Base):
    """The figures of a training, in status and manifest by these names in camelCase.

    Losses are means in nats per answer token. A figure that was not measured is absent.
    """

    model_config = ConfigDict(extra="ignore")

    train_loss: float | None = None
    """Mean over all steps."""

    final_loss: float | None = None
    """At the last logging step."""

    train_runtime_seconds: float | None = None
    train_steps: float | None = None
    train_tokens: float | None = None
    tokens_per_second: float | None = None
    """Trained on, evaluations and padding not counted."""

    base_eval_loss: float | None = None
    base_perplexity: float | None = None
    """Of the base model on the held-out rows."""

    eval_loss: float | None = None
    perplexity: float | None = None
    """Of the tuned model on the held-out rows."""

    eval_tokens: float | None = None
    best_step: float | None = None
    """The step whose adapter was kept, with earlyStopping."""

    trainable_parameters: float | None = None
    base_parameters: float | None = None

    def named(self) -> dict[str, float]:
        """What is known, by the names in status."""
        return self.model_dump(exclude_none=True)

    def rounded(self) -> TrainingMetrics:
        """The same with six digits behind the point."""
        return TrainingMetrics(**{name: round(value, 6) for name, value in self.named().items()})


class LogEntry(BaseModel):
    """What the Trainer logged at a step, by its own names."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    step: int
    epoch: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    eval_loss: float | None = None


class TrainingRecord(Base):
    """The whole of metrics.json. An export may read one that another version wrote."""

    model_config = ConfigDict(extra="ignore")

    metrics: TrainingMetrics
    hyperparameters: dict[str, JsonValue]
    """spec.training as it was applied, e.g. with the epochs that `auto` stood for."""

    notices: tuple[Notice, ...] = ()
    history: tuple[LogEntry, ...] = ()
    """For curves."""
