"""Do the answers follow from their questions? Held-out answers with their own, and with another's.

A dataset whose answers stand beside the wrong questions (a column that was sorted alone, a join
that went wrong) has a loss that falls all the same: the model learns what answers sound like. But
then each is as likely after any other question. SmolLM2-135M after three epochs with the defaults,
real questions and answers, nats a token more with another row's question, with standard error:

    240 rows as they are   1.35 +- 0.13    the same, answers shuffled       -0.04 +- 0.05
                                           480 rows, answers shuffled       -0.03 +- 0.03

Not covered: data that gives all its rows one question, and conversations of several answers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean, stdev
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import Notice, NoticeCode
from finetune_trainer.model.tokenizer import IGNORED, encode_batch
from finetune_trainer.train.link.work import Work
from finetune_trainer.train.recipe.curves import evaluations_of
from finetune_trainer.train.recipe.diagnosis import FLAT_ABOVE
from finetune_trainer.train.recipe.trainer import RecipeTrainer

MOST, FEWEST = 16, 8  # rows that are looked at; that a statement needs
ERRORS = 2.0  # standard errors; a difference of more is one, however small
SHARE = 0.1  # of the loss; rows that leave room for a larger difference tell nothing
LEARNT = 0.98  # of the base model's loss; above, too little was learnt to tell

Row = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """Mean loss of one answer, in nats a token."""

    own: float
    other: float
    """With another row's question."""


def look(trainer: RecipeTrainer, work: Work, tokenizer: PreTrainedTokenizerBase) -> Notice | None:
    """The notice that the answers don't follow; every process of a training has to call it."""
    found = evaluations_of(trainer)
    steps = trainer.state.global_step
    if work.held_out is None or 0 not in found or steps not in found:
        return None
    if found[steps]["eval_loss"] > LEARNT * found[0]["eval_loss"]:
        return None
    with work.held_out.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, MOST)]
    return judge(list(_measured(trainer, work, tokenizer, swapped(rows))), steps)


def swapped(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Each row of one answer, and the same with the question of a row far from it."""
    pairs = []
    for number, row in enumerate(rows):
        other = rows[(number + len(rows) // 2) % len(rows)]
        differs = other["prompt"] != row["prompt"] and other["completion"] != row["completion"]
        if differs and not any(_has_answers(each) for each in (row, other)):
            pairs.append((row, {**row, "prompt": other["prompt"]}))
    return pairs


def judge(pairs: Sequence[Pair], step: int) -> Notice | None:
    """Whether another's question serves an answer as well as its own."""
    if len(pairs) < FEWEST:
        return None
    own, gains = fmean(p.own for p in pairs), [p.other - p.own for p in pairs]
    gain, error = fmean(gains), ERRORS * stdev(gains) / math.sqrt(len(gains))
    if own < FLAT_ABOVE or gain > error or gain + error > SHARE * own:
        return None
    return Notice(
        code=NoticeCode.ANSWERS_UNRELATED,
        step=step,
        evidence=f"{len(pairs)} held-out answers have a mean loss of {own:.3g} with their own "
        f"question, and {own + gain:.3g} with another row's",
        remedy="The responses don't follow from their instructions. Check that no column of the "
        "dataset was sorted or joined alone, and that spec.dataset.columns names the right ones.",
    )


def _measured(
    trainer: RecipeTrainer,
    work: Work,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Iterable[tuple[Row, Row]],
) -> Iterator[Pair]:
    for pair in pairs:
        batches = []
        for encoded in encode_batch(tokenizer, list(pair)):
            ids = encoded.ids[: work.max_sequence_length]
            labels = encoded.labels[: work.max_sequence_length]
            if any(label != IGNORED for label in labels[1:]):
                batches.append(trainer.data_collator([{"input_ids": ids, "labels": labels}]))
        if len(batches) == len(pair):
            own, other = (float(trainer.mean_loss(batch)[0]) for batch in batches)
            yield Pair(own, other)


def _has_answers(row: Row) -> bool:
    """Whether the question has answers of its own, as that of a conversation has."""
    return any(message["role"] == "assistant" for message in row["prompt"])
