"""What report and card are written from: the values of the stages, read once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from finetune_trainer.contract import Artifact, FileCheck, GateReport, Notice, RunConfig
from finetune_trainer.model.source import display_name
from finetune_trainer.runtime.units import perplexity

if TYPE_CHECKING:  # it imports transformers, which takes seconds
    from finetune_trainer.export.manifest import Lineage


class Point(NamedTuple):
    """A loss in nats per token at an optimizer step."""

    step: int
    loss: float

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return perplexity(self.loss)


@dataclass(frozen=True)
class Change:
    """What the training changed on the held-out rows."""

    base_loss: float
    tuned_loss: float
    by: str
    """Who measured it: `training` or `gate`."""

    @property
    def better(self) -> bool:
        """Whether the tuned model predicts the held-out answers better than its base."""
        return self.tuned_loss < self.base_loss

    @property
    def base_perplexity(self) -> float:
        """Of the base model."""
        return perplexity(self.base_loss)

    @property
    def tuned_perplexity(self) -> float:
        """Of the tuned model."""
        return perplexity(self.tuned_loss)


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file, what was found out about it, and where it lies."""

    check: FileCheck
    artifact: Artifact | None
    """None where it was written to no folder that is published."""


@dataclass(frozen=True)
class Facts:
    """Everything that is known of an export when its report is written."""

    config: RunConfig
    lineage: Lineage
    created: str
    """RFC 3339; the manifest's."""

    gate: GateReport
    files: tuple[Artifact, ...]
    dataset: Mapping[str, Any]
    """dataset-report.json."""

    metrics: Mapping[str, float]
    """Of the training; finite ones only."""

    hyperparameters: Mapping[str, Any]
    notices: tuple[Notice, ...]
    losses: tuple[Point, ...]
    """Training loss by step."""

    evaluations: tuple[Point, ...]
    """Loss on the held-out rows by step; step 0 is the base model."""

    license: str | None = None
    """Of the base model, as the Hub names licenses; None where it isn't known."""

    @classmethod
    def of(
        cls,
        config: RunConfig,
        lineage: Lineage,
        *,
        trained: Mapping[str, Any],
        dataset: Mapping[str, Any],
        gate: GateReport,
        files: Iterable[Artifact],
        created: str,
        license: str | None = None,  # noqa: A002 - the Hub's word
    ) -> Self:
        """From the values that the stages left; `trained` is metrics.json, `dataset` is
        dataset-report.json."""
        history = trained.get("history") or []
        return cls(
            config=config,
            lineage=lineage,
            created=created,
            gate=gate,
            files=tuple(files),
            dataset=dataset,
            metrics={name: value for name, value in trained["metrics"].items() if finite(value)},
            hyperparameters=trained["hyperparameters"],
            notices=tuple(Notice.model_validate(each) for each in trained.get("notices") or []),
            losses=points(history, "loss"),
            evaluations=points(history, "eval_loss"),
            license=license,
        )

    @property
    def name(self) -> str:
        """What the tuned model is called."""
        return self.config.job.name if self.config.job else f"{self.base_name}-tuned"

    @property
    def base_name(self) -> str:
        """The base model's short name."""
        return display_name(self.config.model.source)

    @property
    def parameters(self) -> float:
        """Of the base model; 0 where the training didn't count them."""
        return self.metrics.get("baseParameters", 0)

    @property
    def change(self) -> Change | None:
        """Base and tuned model on the held-out rows; None where one of them wasn't measured.

        The training measures on all of them, the gate only on some.
        """
        base, tuned = self.metrics.get("baseEvalLoss"), self.metrics.get("evalLoss")
        if base is not None and tuned is not None:
            return Change(base, tuned, "training")
        base, tuned = self.gate.base_perplexity, self.gate.tuned_perplexity
        if base and tuned and self.gate.held_out:
            return Change(math.log(base), math.log(tuned), "gate")
        return None

    @property
    def best(self) -> Point | None:
        """The evaluation with the lowest loss after the start."""
        return min((p for p in self.evaluations if p.step), key=lambda p: p.loss, default=None)

    @property
    def ggufs(self) -> tuple[GgufFile, ...]:
        """The GGUF files that were checked, in the gate's order."""
        places = {each.path.rpartition("/")[2]: each for each in self.files}
        return tuple(GgufFile(check, places.get(check.file)) for check in self.gate.files)

    def has(self, folder: str) -> bool:
        """Whether the output has such a folder (or file)."""
        return any(each.path == folder or each.path.startswith(f"{folder}/") for each in self.files)


def points(history: Iterable[Mapping[str, Any]], name: str) -> tuple[Point, ...]:
    """One curve of the training's history; entries that are no number are left out."""
    return tuple(
        Point(int(entry["step"]), float(entry[name]))
        for entry in history
        if finite(entry.get(name)) and finite(entry.get("step"))
    )


def finite(value: Any) -> bool:
    """Whether it is a number that can be shown."""
    return isinstance(value, int | float) and math.isfinite(value)
