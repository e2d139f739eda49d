"""What watches over a training: trouble while it runs, early stopping, answers without questions.

`diagnosis` judges the curves. This module feeds it, and acts where a training must not go on.
"""

# ruff: noqa: ARG002 - the arguments are transformers'

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from finetune_trainer.contract import (
    EarlyStopping,
    Example,
    Notice,
    NoticeCode,
    Reason,
    StageError,
    Training,
)
from finetune_trainer.model.tokenizer import IGNORED, encode_batch
from finetune_trainer.train.link import TrainingWork
from finetune_trainer.train.recipe.diagnosis import FLAT_ABOVE, diagnose, not_finite_notice
from finetune_trainer.train.recipe.trainer import RecipeTrainer
from finetune_trainer.train.recipe.training_log import evaluations_of, is_finite, log_points

Notify = Callable[[Notice], None]

log = logging.getLogger(__name__)

# --- Trouble while it runs ---------------------------------------------------------------------

BAD_UPDATES = 3  # in a row
GROWTH = 50  # the curves are judged again when the log has grown by a fiftieth: linear in total


class TrainingWatch(TrainerCallback):
    """Leaves out updates that would ruin the weights, and sends what the curves say, each once.

    It needs no state of its own after a resume: it judges the Trainer's log.
    """

    def __init__(
        self,
        notify: Notify | None,
        settings: Training,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """`scaler` is that of a training in float16."""
        self._notify = notify
        self._scaler = scaler
        self._settings = settings
        self._sent: set[str] = set()
        self._judge_at_lines = 0
        self._left_out: list[int] = []  # steps in a row whose update was left out
        self._overflows = 0  # of them, at their beginning, for which the scale was too large
        self._updated = False  # whether any update was made

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Leave out an update that is not finite. Raises StageError at the third in a row."""
        optimizer = objects["optimizer"]
        norm = gradient_norm(optimizer)
        if norm is None or torch.isfinite(norm):
            self._left_out, self._overflows, self._updated = [], 0, True
            return
        for parameter in _parameters(optimizer):
            parameter.grad = None
        self._left_out.append(state.global_step + 1)
        if self._scaler is not None and self._scaler.get_scale() > 1:
            # It halves its scale after each of them, and begins with one that is often too large.
            self._overflows += 1
            log.info("step %d: left out, float16 overflowed", self._left_out[-1])
            return
        log.warning("step %d: the gradient is not finite, so it is left out", self._left_out[-1])
        self._send(self._not_finite(state))
        if len(self._left_out) - self._overflows == BAD_UPDATES:
            raise self._diverged(state)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        lines = len(state.log_history)
        if self._notify is None or lines < self._judge_at_lines:
            return
        self._judge_at_lines = lines + 1 + lines // GROWTH
        self._judge_curves(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Judge them once more. Raises StageError when not one update could be made."""
        if self._left_out and not self._updated:
            raise self._diverged(state)
        self._judge_curves(state)

    def _judge_curves(self, state: Any) -> None:
        points = log_points(state.log_history)
        if self._scaler is not None:
            # A gradient that overflowed at too large a scale says nothing about the training.
            points = [p if is_finite(p.grad_norm) else replace(p, grad_norm=None) for p in points]
        for notice in diagnose(points, self._settings):
            self._send(notice)

    def _send(self, notice: Notice) -> None:
        if self._notify is not None and notice.code not in self._sent:
            self._sent.add(notice.code)
            self._notify(notice)

    def _not_finite(self, state: Any) -> Notice:
        updated = self._updated or bool(state.global_step >= BAD_UPDATES)
        evidence = f"the gradient is NaN or infinite at step {', '.join(map(str, self._left_out))}"
        losses = [point for point in log_points(state.log_history) if is_finite(point.loss)]
        if losses and updated:  # the Trainer logs 0 for a loss that never was a number
            evidence += f"; loss {losses[-1].loss:.3g} at step {losses[-1].step}"
        evidence += "; the update is left out"
        return not_finite_notice(
            self._left_out[-1], evidence, self._settings, finite_before=updated
        )

    def _diverged(self, state: Any) -> StageError:
        notice = self._not_finite(state)
        return StageError(
            Reason.TRAINING_DIVERGED, f"The training has diverged: {notice.text}", notices=(notice,)
        )


def gradient_norm(optimizer: Any) -> torch.Tensor | None:
    """Norm over all gradients, the same in every process; None where there are no gradients."""
    gradients = [p.grad for p in _parameters(optimizer) if p.grad is not None]
    if not gradients:
        return None
    norm = torch.nn.utils.get_total_norm(gradients)
    # With fsdp a process has only its part of each gradient.
    full_tensor = getattr(norm, "full_tensor", None)
    return full_tensor() if full_tensor else norm


def _parameters(optimizer: Any) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


# --- Early stopping ----------------------------------------------------------------------------

BEST_ADAPTER = "best_adapter.safetensors"  # in a checkpoint's folder; or the best weights of all


class BestAdapter(TrainerCallback, ExportableState):
    """Stops when the held-out loss gets no better, and keeps the weights of the lowest loss.

    The base model (step 0) is no candidate: an adapter that changes nothing is none. The weights
    are held in memory (on the CPU) and go into every checkpoint. With fsdp each process keeps its
    own part, in memory only. After a resume the search for the best begins anew there.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        settings: EarlyStopping,
        notify: Notify | None,
        resume_from: Path | None = None,
    ) -> None:
        self._model = model
        self._settings = settings
        self._notify = notify
        self._resume_from = resume_from
        self._weights: dict[str, torch.Tensor] = {}
        self.best_loss, self.best_step, self.without_gain = math.inf, 0, 0

    def state(self) -> dict[str, Any]:
        """For trainer_state.json, from where it comes back after a resume."""
        names = ("best_loss", "best_step", "without_gain")
        found = {name: getattr(self, name) for name in names}
        # JSON has no infinity.
        return {"args": {}, "attributes": found if self.best_step else {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Fetch the best weights so far."""
        file = self._resume_from / BEST_ADAPTER if self._resume_from else None
        if file and file.exists():
            self._weights = load_file(file)

    def on_evaluate(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        """Compare, and stop after as many evaluations without gain as the spec allows."""
        step, loss = state.global_step, float(values["metrics"]["eval_loss"])
        if step in (0, self.best_step):
            return
        if self.best_step and not self._weights:
            self.best_loss, self.best_step = math.inf, 0  # resumed without them
        gained = loss < self.best_loss - self._settings.min_delta
        self.without_gain = 0 if gained else self.without_gain + 1
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, step
            self._weights = {name: p.detach().to("cpu", copy=True) for name, p in self._trained()}
        if self.without_gain >= self._settings.patience and step < state.max_steps:
            control.should_training_stop = True
            self._notify_stop(step, state.max_steps, loss)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add the best weights to the checkpoint."""
        whole = all(type(value) is torch.Tensor for value in self._weights.values())
        if self._weights and whole and state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            save_file(self._weights, folder / BEST_ADAPTER)

    def restore(self, last_step: int) -> None:
        """Put the best weights back into the model."""
        if not self._weights or self.best_step == last_step:
            return
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(self._weights[name])
        log.info("What step %d had learnt is kept (loss %.4f)", self.best_step, self.best_loss)

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]

    def _notify_stop(self, step: int, steps: int, loss: float) -> None:
        if self._notify is None:
            return
        self._notify(
            Notice(
                code=NoticeCode.EARLY_STOPPED,
                step=step,
                evidence=f"the loss on the held-out rows is {loss:.4f} at step {step} of {steps}, "
                f"and was {self.best_loss:.4f} at step {self.best_step}: "
                f"{self.without_gain} evaluations without a gain",
                remedy=f"The training stopped, and what step {self.best_step} had learnt is kept.",
            )
        )


# --- Answers that don't follow from their questions ---------------------------------------------

MOST_PAIRS, FEWEST_PAIRS = 16, 8  # rows that are compared; that a statement needs
ERRORS = 2.0  # standard errors; a difference of more is one, however small
SHARE = 0.1  # of the loss; rows that leave room for a larger difference tell nothing
LEARNT = 0.98  # of the base model's loss; above, too little was learnt to tell


@dataclass(frozen=True)
class AnswerLoss:
    """Mean loss of one answer, in nats a token."""

    own_question: float
    other_question: float
    """With the question of another row."""


def find_unrelated_answers(
    trainer: RecipeTrainer, work: TrainingWork, tokenizer: PreTrainedTokenizerBase
) -> Notice | None:
    """Compare the loss of held-out answers after their own question and after another row's.

    Where answers stand beside the wrong questions (a column that was sorted alone, a join that went
    wrong), the loss falls all the same: the model learns what answers sound like. But then each
    answer is as likely after any other question. Measured on SmolLM2-135M after three epochs with
    the defaults, real questions and answers, in nats a token more with another row's question, with
    standard error:

        240 rows as they are   1.35 +- 0.13    the same, answers shuffled       -0.04 +- 0.05
                                               480 rows, answers shuffled       -0.03 +- 0.03

    Not covered: data with one question for all rows, and conversations of several answers or
    with tools. Every process of a training has to call it.
    """
    if work.config.training.objective != "sft":
        return None
    found = evaluations_of(trainer)
    steps = trainer.state.global_step
    if work.held_out is None or 0 not in found or steps not in found:
        return None
    if found[steps]["eval_loss"] > LEARNT * found[0]["eval_loss"]:
        return None
    with work.held_out.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, MOST_PAIRS)]
    losses = _answer_losses(trainer, work, tokenizer, swap_questions(rows))
    return judge_answers(list(losses), steps)


def swap_questions(rows: Sequence[Example]) -> list[tuple[Example, Example]]:
    """Each row of one answer, and the same with the question of a row far from it."""
    pairs = []
    for number, row in enumerate(rows):
        other = rows[(number + len(rows) // 2) % len(rows)]
        differs = other["prompt"] != row["prompt"] and other["completion"] != row["completion"]
        if differs and _is_pair(row) and _is_pair(other):
            swapped = Example(prompt=other["prompt"], completion=row["completion"])
            pairs.append((row, swapped))
    return pairs


def judge_answers(losses: Sequence[AnswerLoss], step: int) -> Notice | None:
    """Whether another row's question serves an answer as well as its own."""
    if len(losses) < FEWEST_PAIRS:
        return None
    own = fmean(each.own_question for each in losses)
    gains = [each.other_question - each.own_question for each in losses]
    gain, error = fmean(gains), ERRORS * stdev(gains) / math.sqrt(len(gains))
    if own < FLAT_ABOVE or gain > error or gain + error > SHARE * own:
        return None
    return Notice(
        code=NoticeCode.ANSWERS_UNRELATED,
        step=step,
        evidence=f"{len(losses)} held-out answers have a mean loss of {own:.3g} with their own "
        f"question, and {own + gain:.3g} with another row's",
        remedy="The responses don't follow from their instructions. Check that no column of the "
        "dataset was sorted or joined alone, and that spec.dataset.columns names the right ones.",
    )


def _answer_losses(
    trainer: RecipeTrainer,
    work: TrainingWork,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Iterable[tuple[Example, Example]],
) -> Iterator[AnswerLoss]:
    for pair in pairs:
        batches = []
        for encoded in encode_batch(tokenizer, list(pair)):
            ids = encoded.ids[: work.max_sequence_length]
            labels = encoded.labels[: work.max_sequence_length]
            if any(label != IGNORED for label in labels[1:]):
                batches.append(trainer.data_collator([{"input_ids": ids, "labels": labels}]))
        if len(batches) == len(pair):
            own, other = (float(trainer.mean_loss(batch)[0]) for batch in batches)
            yield AnswerLoss(own, other)


def _is_pair(row: Example) -> bool:
    """Whether it is a question and an answer in words: no tools, earlier answers or reasoning."""
    (answer,) = row["completion"]
    return (
        "tools" not in row
        and len(answer) == len(("role", "content"))
        and all(message["role"] in {"system", "user"} for message in row["prompt"])
    )
