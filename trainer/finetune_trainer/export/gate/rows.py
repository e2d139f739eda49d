"""The rows that the gate measures on: few enough to compute, many enough to tell.

The answers are measured, since they are what was trained. Prompts are context only. Some rows
become samples, which a person reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import Example, Message
from finetune_trainer.export.reference import MeasuredRow
from finetune_trainer.model.rendering import render_example
from finetune_trainer.model.tokenizer import IGNORED, Encoded, encode_batch

T = TypeVar("T")

MAX_ROWS = 64
MAX_ANSWER_TOKENS = 512
"""Over all rows. The mean KL divergence of 512 tokens has a relative standard error of 5-10%."""
MAX_ANSWER_TOKENS_OF_ROW = 128
MAX_TOKENS_OF_ROW = 1024
MAX_TOKENS = 2048
"""Over all rows, with their prompts. It bounds the time: a model of 8 billion parameters computes
16 GFLOP for each, twice in float32 for the reference, and once for each file."""


@dataclass(frozen=True)
class MeasuredRows:
    """The conversations that files are measured on."""

    examples: tuple[Example, ...]
    texts: tuple[str, ...]
    """Each conversation as the chat template renders it."""

    full_ids: tuple[tuple[int, ...], ...]
    """The tokens of each conversation."""

    measured: tuple[MeasuredRow, ...]
    """The part of each that is measured; rows beyond the budget are left out."""

    @property
    def tokens(self) -> int:
        """Tokens that are measured."""
        return sum(len(row.measured) for row in self.measured)


def choose_rows(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> MeasuredRows:
    """Spread the choice over the whole file, where rows of one kind often stand together."""
    chosen = tuple(spread(examples, MAX_ROWS))
    encoded = encode_batch(tokenizer, chosen)
    return MeasuredRows(
        examples=chosen,
        texts=tuple(render_example(tokenizer, example) for example in chosen),
        full_ids=tuple(tuple(item.ids) for item in encoded),
        measured=tuple(within_budget(measured_part(item) for item in encoded)),
    )


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of them, at equal distances, in their order."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def measured_part(encoded: Encoded) -> MeasuredRow:
    """The first answer tokens of a conversation, with as many tokens before them as are allowed."""
    learnt = [i for i, label in enumerate(encoded.labels) if label != IGNORED and i > 0]
    learnt = learnt[:MAX_ANSWER_TOKENS_OF_ROW]
    end = learnt[-1] + 1 if learnt else 0
    start = max(0, end - MAX_TOKENS_OF_ROW)
    measured = tuple(i - start for i in learnt if i > start)
    return MeasuredRow(ids=tuple(encoded.ids[start:end]), measured=measured)


def within_budget(rows: Iterable[MeasuredRow]) -> Iterable[MeasuredRow]:
    """Rows with something to measure, until the answers' or all tokens' budget is used up."""
    answers = tokens = 0
    for row in rows:
        if not row.measured:
            continue
        measured = row.measured[: MAX_ANSWER_TOKENS - answers]
        if not measured:
            return
        if tokens + len(row.ids) > MAX_TOKENS:
            continue  # a shorter one may fit
        answers += len(measured)
        tokens += len(row.ids)
        yield MeasuredRow(ids=row.ids[: measured[-1] + 1], measured=measured)


def question_of(example: Example) -> str:
    """The last question, and what tools were asked and answered since."""
    turns = example["prompt"]
    asked = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
    since = turns[asked[-1] :] if asked else turns[-1:]
    return "\n\n".join(
        f"{turn.get('name', 'tool')}: {turn['content']}" if turn["role"] == "tool" else said(turn)
        for turn in since
    )


def said(message: Message) -> str:
    """What a message says, with the tools that it calls."""
    functions = [call["function"] for call in message.get("tool_calls", [])]
    calls = [f"{f['name']}({json.dumps(f['arguments'], ensure_ascii=False)})" for f in functions]
    parts = [message.get("reasoning_content", ""), message["content"], *calls]
    return "\n\n".join(part for part in parts if part)
