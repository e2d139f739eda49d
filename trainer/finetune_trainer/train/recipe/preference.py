"""Preferences instead of answers: the objectives dpo, orpo and kto.

    dpo   -log sigmoid(beta * (r(chosen) - r(rejected)))                    arXiv 2305.18290
    orpo  -mean log p(chosen) - beta * log sigmoid(log odds ratio)          arXiv 2403.07691
    kto   w * (1 - sigmoid(+-beta * (r(answer) - KL)))                      arXiv 2402.01306

r is the log-probability of an answer less that under the reference, which is the model with its
adapter switched off. dpo and kto compute what TRL's DPOTrainer and KTOTrainer compute, and the odds
ratio is that of its (experimental) ORPOTrainer: tests hold losses and gradients against theirs. The
recipe's own trainer is used for all three, since theirs tie the result to how a step is split:
they take means of the passes' means, and KTO's KL is that of one pass. Here a step is a mean over
its rows, and the KL one over its rows, however they are split. So packing, resume, several
processes and an exact evaluation are those of sft.

As in TRL nothing is dropped out, since model and reference would differ by chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import datasets
import torch
from torch.nn.functional import logsigmoid, relu
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.utils import disable_dropout_in_model

from finetune_trainer.contract import Lora, Objective, Preference, Training
from finetune_trainer.model.tokenizer import IGNORED
from finetune_trainer.train.recipe.data import PackingCollator, PaddingCollator, StepSampler
from finetune_trainer.train.recipe.trainer import Batch, EvaluationSampler, RecipeTrainer

Sums = torch.Tensor
"""One value for each answer of a batch, or for each pair."""

RowAndOther = tuple[int, int]
"""Numbers of a row, and of the row whose answer is put behind its question to estimate the KL."""


# --- Losses --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerScores:
    """Answers of a batch under the model: of pairs all chosen ones come before all others."""

    logps: Sums
    """Sum of the log-probabilities of the answer's tokens, in nats."""

    tokens: Sums
    """Tokens of the answer, at least 1."""

    reference: Sums
    """As `logps` under the reference; zeros where there is none."""

    @property
    def ratios(self) -> Sums:
        return self.logps - self.reference

    def halves(self, values: Sums) -> tuple[Sums, Sums]:
        """Values of the chosen and of the rejected answers."""
        chosen, rejected = values.chunk(2)
        return chosen, rejected


@dataclass(frozen=True)
class Judged:
    """A batch as the objective judges it."""

    losses: Sums
    """Of each pair, or row."""

    rewards: Sums
    """Of each answer."""


def dpo_losses(scores: AnswerScores, preference: Preference) -> Judged:
    beta = preference.beta
    chosen, rejected = scores.halves(scores.ratios)
    if preference.loss_type == "hinge":
        losses = relu(1 - beta * (chosen - rejected))
    elif preference.loss_type == "ipo":
        # A mean over each answer's tokens, as TRL has it from the paper's authors.
        chosen_mean, rejected_mean = scores.halves(scores.ratios / scores.tokens)
        losses = (chosen_mean - rejected_mean - 1 / (2 * beta)) ** 2
    else:
        losses = -logsigmoid(beta * (chosen - rejected))
    return Judged(losses, beta * scores.ratios.detach())


def orpo_losses(scores: AnswerScores, preference: Preference) -> Judged:
    means = scores.logps / scores.tokens
    chosen, _ = scores.halves(means)
    # log(p / (1 - p)) of each answer; a probability of 1 would have infinite odds.
    odds = means - torch.log1p(-torch.exp(means.clamp(max=-1e-6)))
    better, worse = scores.halves(odds)
    losses = -chosen - preference.beta * logsigmoid(better - worse)
    return Judged(losses, preference.beta * means.detach())


def kto_losses(
    scores: AnswerScores, desirable: torch.Tensor, kl: torch.Tensor, preference: Preference
) -> Judged:
    """`kl` is the mean over the step's rows of the log-ratio of other rows' answers."""
    distance = preference.beta * (scores.ratios - kl.clamp(min=0))
    good = preference.desirable_weight * (1 - torch.sigmoid(distance))
    bad = preference.undesirable_weight * (1 - torch.sigmoid(-distance))
    return Judged(torch.where(desirable, good, bad), preference.beta * scores.ratios.detach())


# --- Rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerCollator:
    """Conversations as sft lays them (packed or padded), and which one each position belongs to."""

    base: PackingCollator | PaddingCollator
    pairs: bool
    longest: int
    """Tokens of the longest conversation; a question with another row's answer is cut there."""

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        first = [_sequence(row["input_ids"], row["labels"]) for row in rows]
        second = [
            _sequence(row["rejected_ids"], row["rejected_labels"]) for row in rows if self.pairs
        ]
        batch = self._lay([*first, *second])
        batch["rows"] = len(rows)
        if rows and "desirable" in rows[0]:
            batch["desirable"] = torch.tensor([row["desirable"] for row in rows])
        if rows and "other_ids" in rows[0]:
            batch["others"] = self._lay([self._with_other_answer(row) for row in rows])
        return batch

    def _lay(self, sequences: list[dict[str, Any]]) -> Batch:
        batch = self.base(sequences)
        labels = batch["labels"]
        places = torch.arange(labels.shape[0])[:, None].expand(labels.shape)
        if "cu_seq_lens_q" in batch:
            bounds = batch["cu_seq_lens_q"]
            places = torch.repeat_interleave(bounds.diff())[None]
        return {**batch, "places": places.contiguous(), "answers": len(sequences) or 1 + self.pairs}

    def _with_other_answer(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row's question with another row's answer."""
        question = row["input_ids"][: _answer_begins(row["labels"])]
        answer = row["other_ids"][_answer_begins(row["other_labels"]) :]
        labels = [IGNORED] * len(question) + answer
        return _sequence((question + answer)[: self.longest], labels[: self.longest])


def _sequence(ids: list[int], labels: list[int]) -> dict[str, Any]:
    return {"input_ids": ids, "labels": labels}


def _answer_begins(labels: list[int]) -> int:
    return next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))


class PassesWithOthers(torch.utils.data.Dataset[list[dict[str, Any]]]):
    """The rows of a pass, each with the answer of another row."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, keys: Sequence[RowAndOther]) -> list[dict[str, Any]]:
        found = []
        for number, other in keys:
            answer = self._rows[other]
            more = {"other_ids": answer["input_ids"], "other_labels": answer["labels"]}
            found.append({**self._rows[number], **more})
        return found


class SamplerWithOthers(Sampler[list[list[RowAndOther]]]):
    """The steps of another sampler; each row with the one before it in the order of all rows."""

    def __init__(self, steps: Sampler[list[list[int]]], order: Sequence[int]) -> None:
        self._steps = steps
        self._before = {row: order[place - 1] for place, row in enumerate(order)}

    def __len__(self) -> int:
        return len(cast("StepSampler", self._steps))

    def __iter__(self) -> Iterator[list[list[RowAndOther]]]:
        for passes in self._steps:
            yield [[(row, self._before[row]) for row in rows] for rows in passes]


class EachAStep(Sampler[list[list[int]]]):
    """Passes one by one, as steps of one pass."""

    def __init__(self, passes: EvaluationSampler) -> None:
        self._passes = passes

    def __len__(self) -> int:
        return len(self._passes)

    def __iter__(self) -> Iterator[list[list[int]]]:
        for rows in self._passes:
            yield [rows]


# --- Trainer -------------------------------------------------------------------------------------

LOSS, ROWS, RIGHT, GOOD, GOOD_ROWS, BAD, BAD_ROWS = range(7)
"""Places of what an evaluation adds up: losses, rows, those that are judged right, rewards of
chosen (or desirable) answers and how many these are, and the same of the others."""


class PreferenceTrainer(RecipeTrainer):
    """Trains on pairs (dpo, orpo), or on answers that are good or bad (kto)."""

    def __init__(self, *, settings: Training, **options: Any) -> None:
        if not options["data"].packed:
            # A pair is padded to its longer conversation, so that its tokens don't tell its size.
            options["limits"] = replace(options["limits"], tokens=0)
        super().__init__(**options)
        self.objective: Objective = settings.objective
        self._preference = settings.preference
        self.data_collator: Any = AnswerCollator(
            cast("Any", self.data_collator),
            pairs=settings.objective in ("dpo", "orpo"),
            longest=int(self.data.examples.longest.max()),
        )
        self._kl = torch.zeros(())
        disable_dropout_in_model(cast("torch.nn.Module", self.model))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], _: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The passes of a step; with kto the step's KL is computed before the first of them."""
        batches, count = super().get_batch_samples(epoch_iterator, _, device)
        if self.objective == "kto":
            with self.compute_loss_context_manager():
                self._kl = self._mean_kl(batches[0])
        return batches, count

    def _get_num_items_in_batch(
        self, batch_samples: list[Batch], device: torch.device
    ) -> torch.Tensor | None:
        """The rows of a step, of all processes."""
        count = torch.tensor(sum(batch["rows"] for batch in batch_samples), device=device)
        return cast("torch.Tensor", self.accelerator.reduce(count, reduction="sum"))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Sum over the rows of a pass, divided by how many the whole step has."""
        assert not return_outputs, "the evaluation below asks for the loss only"  # noqa: S101
        assert num_items_in_batch is not None, "counted above"  # noqa: S101
        judged = self._judge(model, inputs)
        # A pass without rows has one without labels, so that all processes do the same.
        total = judged.losses.sum() if inputs["rows"] else 0.0 * judged.losses.sum()
        return total * self.args.world_size / num_items_in_batch

    def _judge(self, model: torch.nn.Module, inputs: Batch) -> Judged:
        scores = self._scores(model, inputs)
        if self.objective == "orpo":
            return orpo_losses(scores, self._preference)
        if self.objective == "dpo":
            return dpo_losses(scores, self._preference)
        desirable = inputs.get("desirable", torch.zeros_like(scores.logps, dtype=torch.bool))
        return kto_losses(scores, desirable, self._kl, self._preference)

    def _scores(self, model: torch.nn.Module, batch: Batch) -> AnswerScores:
        with torch.no_grad(), self._as_reference():
            if self.objective == "orpo":  # it has no reference
                reference = torch.zeros((), device=self.args.device)
            else:
                reference = self._logps(model, batch)
        labels = batch["labels"][:, 1:] != IGNORED
        tokens = _by_answer(labels.float(), batch).clamp(min=1)
        return AnswerScores(self._logps(model, batch), tokens, reference)

    def _logps(self, model: torch.nn.Module, batch: Batch) -> Sums:
        """Sum of the log-probabilities of each answer's tokens."""
        self.on_pass()
        inputs = {key: value for key, value in batch.items() if key not in _OURS}
        return _by_answer(self.token_logps(model, inputs), batch)

    def _as_reference(self) -> AbstractContextManager[Any]:
        if self.objective == "orpo":
            return nullcontext()
        tuned: Any = self.accelerator.unwrap_model(self.model)
        return cast("AbstractContextManager[Any]", tuned.disable_adapter())

    def _mean_kl(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Mean log-ratio of answers behind questions that are not theirs, over all processes."""
        model = cast("torch.nn.Module", self.model)
        sums = torch.zeros(2, device=self.args.device)
        with torch.no_grad():
            for batch in batches:
                others = batch.get("others")
                if others is None:  # a pass without rows
                    others = {key: value for key, value in batch.items() if key != "rows"}
                ours = self._logps(model, others)
                with self._as_reference():
                    ratios = ours - self._logps(model, others)
                sums += torch.stack([ratios.sum(), ratios.new_tensor(float(batch["rows"]))])
        total, rows = self.accelerator.reduce(sums, reduction="sum").unbind()
        return cast("torch.Tensor", total / rows.clamp(min=1))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As for sft; with kto each row comes with another row's answer."""
        if self.objective != "kto":
            return super().get_train_dataloader()
        steps = StepSampler(self.schedule, self.limits, self.args.process_index, self._epoch)
        # One order for the whole training: a row's other answer must not depend on the split.
        sampler = SamplerWithOthers(steps, self.schedule.order(0).tolist())
        rows = PassesWithOthers(self.data.examples.rows)
        return self._loader(rows, sampler, self._collate_passes)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As for sft; with kto each row comes with another row's answer."""
        held_out = self.data.held_out
        if self.objective != "kto" or held_out is None:
            return super().get_eval_dataloader(eval_dataset)
        steps = EachAStep(EvaluationSampler(held_out, self.limits, self.args.process_index))
        sampler = SamplerWithOthers(steps, range(len(held_out)))
        return self._loader(PassesWithOthers(held_out.rows), sampler, self._collate_one)

    def _collate_one(self, passes: list[list[dict[str, Any]]]) -> Batch:
        return cast("Batch", self.data_collator(passes[0]))

    def evaluation_loop(self, dataloader: DataLoader[Any], *_: Any, **options: Any) -> Any:
        """Take means over all held-out rows: of the loss, the rewards, and what is judged right."""
        prefix = options.get("metric_key_prefix", "eval")
        model = cast("torch.nn.Module", self.model)
        model.eval()
        training_kl = self._kl
        sums = torch.zeros(7, dtype=torch.float64, device=self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            if self.objective == "kto":
                self._kl = self._mean_kl([self._prepare_inputs(batch) for batch in dataloader])
            for batch in dataloader:
                sums += self._add_up(model, self._prepare_inputs(batch))
        self._kl = training_kl
        found = self.accelerator.reduce(sums, reduction="sum").tolist()
        return EvalLoopOutput(
            predictions=(),  # type: ignore[arg-type]
            label_ids=None,
            metrics={f"{prefix}_{name}": value for name, value in figures(found).items()},
            num_samples=len(self.data.held_out or ()),
        )

    def _add_up(self, model: torch.nn.Module, inputs: Batch) -> torch.Tensor:
        judged = self._judge(model, inputs)
        rewards = judged.rewards.double()
        if not inputs["rows"]:
            return rewards.new_zeros(7)
        if self.objective == "kto":
            good = inputs["desirable"]
            right = torch.where(good, rewards > 0, rewards < 0)
        else:
            good = torch.arange(len(rewards), device=rewards.device) < inputs["rows"]
            right = rewards[good] > rewards[~good]
        values = [judged.losses.double().sum(), judged.losses.new_tensor(inputs["rows"])]
        values += [right.sum(), rewards[good].sum(), good.sum()]
        return torch.stack([v.double() for v in (*values, rewards[~good].sum(), (~good).sum())])


def figures(sums: Sequence[float]) -> dict[str, float]:
    """The means of an evaluation, by TRL's names."""
    rows = max(sums[ROWS], 1)
    chosen, rejected = (sums[GOOD] / max(sums[GOOD_ROWS], 1), sums[BAD] / max(sums[BAD_ROWS], 1))
    return {
        "loss": sums[LOSS] / rows,
        "rewards/accuracies": sums[RIGHT] / rows,
        "rewards/margins": chosen - rejected,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
    }


_OURS = ("places", "answers", "rows", "desirable", "others")  # what is not the model's


def _by_answer(values: torch.Tensor, batch: Batch) -> Sums:
    """Sums of [rows, time - 1] for each answer; a value is that of the token that is predicted."""
    places = batch["places"][:, 1:].flatten()
    sums = torch.zeros(batch["answers"], dtype=torch.float32, device=values.device)
    return sums.index_add(0, places, values.flatten().float())


def without_dropout(lora: Lora) -> Lora:
    """The adapter's settings with nothing dropped out."""
    return lora.model_copy(update={"dropout": 0.0})
