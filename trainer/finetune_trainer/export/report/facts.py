"""What report and card are written from: the values of the stages, read once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from finetune_trainer.contract import (
    Artifact,
    DatasetReport,
    FileVerdict,
    GateReport,
    Lineage,
    Notice,
    Objective,
    RunConfig,
    TrainingMetrics,
    TrainingRecord,
    display_name,
    version_folder,
)
from finetune_trainer.model.base_model import is_hub
from finetune_trainer.runtime import perplexity
from finetune_trainer.store.versions import version_name


class LossPoint(NamedTuple):
    """A loss in nats per token at an optimizer step."""

    step: int
    loss: float
    reward_accuracy: float | None = None
    reward_margin: float | None = None
    """Of preferences."""

    @property
    def perplexity(self) -> float:
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
        return perplexity(self.base_loss)

    @property
    def tuned_perplexity(self) -> float:
        return perplexity(self.tuned_loss)


class Preferences(NamedTuple):
    """What the tuned model prefers on the held-out rows; see TrainingMetrics."""

    accuracy: float
    margin: float
    base_accuracy: float | None
    """None where the base model's rewards are 0 by definition (dpo, kto)."""

    labelled: bool
    """Whether rows are answers with a label, and not pairs."""

    @property
    def better(self) -> bool:
        """Whether more rows are judged right than a coin would, and than by the base model."""
        return self.accuracy > max(0.5, self.base_accuracy or 0)


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file, what was found out about it, and where it lies."""

    verdict: FileVerdict
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
    dataset: DatasetReport
    trained: TrainingRecord

    license: str | None = None
    """Of the base model, as the Hub names licenses; None where it isn't known."""

    @property
    def metrics(self) -> TrainingMetrics:
        return self.trained.metrics

    @property
    def notices(self) -> tuple[Notice, ...]:
        return self.trained.notices

    @property
    def losses(self) -> tuple[LossPoint, ...]:
        return tuple(LossPoint(e.step, e.loss) for e in self.trained.history if e.loss is not None)

    @property
    def evaluations(self) -> tuple[LossPoint, ...]:
        """Loss on the held-out rows by step; step 0 is the base model."""
        history = self.trained.history
        return tuple(
            LossPoint(e.step, e.eval_loss, e.reward_accuracy, e.reward_margin)
            for e in history
            if e.eval_loss is not None
        )

    @property
    def objective(self) -> Objective:
        return self.config.training.objective

    @property
    def plain_text(self) -> bool:
        """Whether plain text was learnt, and no answers."""
        return self.dataset.detected is not None and self.dataset.detected.layout == "text"

    @property
    def learnt(self) -> str:
        """What a loss is taken over."""
        return "texts" if self.plain_text else "answers"

    @property
    def preferences(self) -> Preferences | None:
        """None where no preferences were learnt, or there were no held-out rows."""
        metrics, objective = self.metrics, self.objective
        if objective == "sft" or metrics.reward_accuracy is None or metrics.reward_margin is None:
            return None
        base = metrics.base_reward_accuracy if objective == "orpo" else None
        labelled = self.dataset.detected is not None and "label" in self.dataset.detected.columns
        return Preferences(metrics.reward_accuracy, metrics.reward_margin, base, labelled)

    @property
    def name(self) -> str:
        """What the tuned model is called."""
        return self.config.job.name if self.config.job else f"{self.base_name}-tuned"

    @property
    def version(self) -> str:
        """Name of the version that the files are of."""
        return version_name(self.lineage.fingerprints.export)

    @property
    def folder(self) -> str:
        """URI of the folder that the files are published in."""
        return f"{self.config.output.folder}/{version_folder(self.version)}"

    @property
    def base_name(self) -> str:
        return display_name(self.config.model.source)

    @property
    def how_trained(self) -> str:
        """How the base model was fine-tuned, after that word."""
        return {"qlora": "with QLoRA", "lora": "with LoRA"}.get(
            self.config.training.method, "in full, all of its weights,"
        )

    @property
    def trained_part(self) -> str:
        """What the training left."""
        return "model" if self.config.training.method == "full" else "adapter"

    @property
    def initial_adapter(self) -> str | None:
        """What the adapter that the training went on from is called; a bucket's name is private."""
        source = self.lineage.init_from
        if source is None or is_hub(source):
            return source
        return display_name(source.rstrip("/").removesuffix("/adapter"))

    @property
    def parameters(self) -> float:
        """Of the base model; 0 where the training didn't count them."""
        return self.metrics.base_parameters or 0

    @property
    def change(self) -> Change | None:
        """Base and tuned model on the held-out rows; None where one of them wasn't measured, and
        where preferences were learnt, which may well make good answers less likely.

        The training measures on all of them, the gate only on some.
        """
        if self.objective != "sft":
            return None
        base, tuned = self.metrics.base_eval_loss, self.metrics.eval_loss
        if base is not None and tuned is not None:
            return Change(base, tuned, "training")
        base, tuned = self.gate.base_perplexity, self.gate.tuned_perplexity
        if base and tuned and self.gate.held_out:
            return Change(math.log(base), math.log(tuned), "gate")
        return None

    @property
    def best(self) -> LossPoint | None:
        """The evaluation with the lowest loss after the start."""
        return min((p for p in self.evaluations if p.step), key=lambda p: p.loss, default=None)

    @property
    def ggufs(self) -> tuple[GgufFile, ...]:
        """The GGUF files that were checked, in the gate's order."""
        places: dict[str, Artifact] = {}
        for each in self.files:
            name = each.whole.rpartition("/")[2]
            first = places.setdefault(name, each)
            if first is not each:  # the parts of a file count together
                places[name] = first.model_copy(update={"bytes": first.bytes + each.bytes})
        return tuple(GgufFile(verdict, places.get(verdict.file)) for verdict in self.gate.files)

    @property
    def unasked(self) -> str:
        """What to say of prompts that there was no time for; empty where there are none."""
        samples = self.gate.samples
        missing = sum(sample.tuned is None for sample in samples)
        if not missing:
            return ""
        verb = "was" if missing == 1 else "were"
        return f"{missing} of {len(samples)} prompts {verb} not asked, since no time was left."

    def has(self, folder: str) -> bool:
        """Whether the output has such a folder (or file)."""
        return any(each.path == folder or each.path.startswith(f"{folder}/") for each in self.files)
