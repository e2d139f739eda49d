"""The rows that the gate measures on: few enough to compute, many enough to tell.

The answers are measured, since they are what was trained. Prompts are context only. Some rows
become samples, which a person reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice, takewhile
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import Example, ListedRows, Message, Sample, is_document
from finetune_trainer.export.reference import Generated, MeasuredRow
from finetune_trainer.model.rendering import begun_and_rest, render_example, render_prompt
from finetune_trainer.model.tokenizer import IGNORED, Encoded, common_length, encode_batch

T = TypeVar("T")

OTHER_QUESTION = "\N{SNOWMAN}"  # no row asks this

MAX_ROWS = 256
MAX_ANSWER_TOKENS = 512
"""Over all rows. The mean KL divergence of 512 tokens has a relative standard error of 5-10%."""
FEWEST_ANSWER_TOKENS = 256
"""Over all rows, where they have as many: prompts are cut to get there."""
MAX_ANSWER_TOKENS_OF_ROW = 128
CONTEXTS = (1024, 512, 256, 128, 64)
"""Tokens before an answer: as many of them as the budget allows."""
MAX_TOKENS = 8192
"""Over all rows, with their prompts, unless CONTEXTS ends before. It bounds the time: a model of 8
billion parameters computes 16 GFLOP for each, twice in float32 for the reference, and once for each
file."""
BLOCK_TOKENS = 16
"""Neighbouring tokens of a row that count as one observation, since they depend on each other."""


FEW_ROWS = 4
"""For the adapter's own file, whose faults are gross: its values are neither rounded nor merged."""

MOST_ROWS = 5000
"""Examples in memory, more than the gate or an importance matrix measures on."""


@dataclass(frozen=True)
class ExampleFiles:
    """What `prepare` made of the dataset: files with one example as JSON a line."""

    trained: Path
    held_out: Path | None

    numbers: ListedRows | None = None
    """Of the held-out rows in the dataset, where they were taken out of it."""

    @property
    def plain_text(self) -> bool:
        """Whether the training learnt plain text, and no answers."""
        with self.trained.open(encoding="utf-8") as lines:
            return any(is_document(json.loads(line)) for line in islice(lines, 1))

    def measured(self) -> list[Example]:
        """The rows that files are measured on: the held-out ones, or else those trained on."""
        return read_examples(self.held_out or self.trained)

    def names(self) -> list[str]:
        """What people call each row of `measured`."""
        file = self.held_out or self.trained
        if self.held_out and self.numbers:
            found = [f"row {row}" for row in self.numbers.rows or ()]
            for name, rows in (self.numbers.files or {}).items():
                found += [f"{name}:{row}" for row in rows]
        else:
            found = [f"line {number} of {file.name}" for number in range(1, count_lines(file) + 1)]
        return every(found, len(found))


def read_examples(file: Path) -> list[Example]:
    """At most MOST_ROWS of a file's examples, one a line as JSON, at equal distances."""
    total = count_lines(file)
    with file.open(encoding="utf-8") as lines:
        found: list[Example] = [json.loads(line) for line in every(lines, total)]
    # Of answers with a label, the good ones: what the model is to say.
    return [example for example in found if example.get("label", True)] or found


def count_lines(file: Path) -> int:
    with file.open(encoding="utf-8") as lines:
        return sum(1 for _ in lines)


def every(items: Iterable[T], total: int) -> list[T]:
    """At most MOST_ROWS of so many items, at equal distances."""
    return list(islice(items, 0, None, -(-total // MOST_ROWS) or 1))


@dataclass(frozen=True)
class MeasuredRows:
    """The conversations that files are measured on."""

    examples: tuple[Example, ...]
    names: tuple[str, ...]
    """Of each conversation, for people."""

    texts: tuple[str, ...]
    """Each conversation as the chat template renders it."""

    full_ids: tuple[tuple[int, ...], ...]
    """The tokens of each conversation."""

    measured: tuple[MeasuredRow, ...]
    """The part of each that is measured; what has no answer or is beyond the budget is left out."""

    places: tuple[int, ...]
    """Which conversation each of `measured` is of."""

    @property
    def tokens(self) -> int:
        """Tokens that are measured."""
        return sum(len(row.measured) for row in self.measured)

    @property
    def conversations(self) -> tuple[int, ...]:
        """For each token that is measured, which conversation it is of."""
        pairs = zip(self.places, self.measured, strict=True)
        return tuple(place for place, row in pairs for _ in row.measured)

    @property
    def few(self) -> tuple[int, ...]:
        """Places of the FEW_ROWS of `measured` whose answers are the longest."""
        longest = sorted(
            range(len(self.measured)), key=lambda place: -len(self.measured[place].measured)
        )
        return tuple(sorted(longest[:FEW_ROWS]))

    def tokens_at(self, places: Iterable[int], values: Sequence[T]) -> tuple[T, ...]:
        """Of `values`, one for each token that is measured, those of some of the rows."""
        begins = [0, *accumulate(len(row.measured) for row in self.measured)]
        return tuple(
            value for place in places for value in values[begins[place] : begins[place + 1]]
        )

    @property
    def blocks(self) -> tuple[int, ...]:
        """For each token that is measured, which block of dependent tokens it is of."""
        most = MAX_ANSWER_TOKENS_OF_ROW
        return tuple(
            number * most + token // BLOCK_TOKENS
            for number, row in enumerate(self.measured)
            for token in range(len(row.measured))
        )


def choose_rows(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    names: Sequence[str] = (),
) -> MeasuredRows:
    """Spread the choice over the whole file, where rows of one kind often stand together.

    `names` are the examples', for people; without them they are numbered.
    """
    numbers = spread(range(len(examples)), MAX_ROWS)
    candidates = [examples[number] for number in numbers]
    encoded = encode_batch(tokenizer, candidates)
    heads = tuple(map(partial(_head, tokenizer), candidates, encoded))
    picked = pick(encoded, heads)
    chosen = tuple(picked)
    return MeasuredRows(
        examples=tuple(candidates[place] for place in chosen),
        names=tuple(
            names[numbers[place]] if names else f"row {numbers[place] + 1}" for place in chosen
        ),
        texts=tuple(render_example(tokenizer, candidates[place]) for place in chosen),
        full_ids=tuple(tuple(encoded[place].ids) for place in chosen),
        measured=tuple(row for row in picked.values() if row.measured),
        places=tuple(at for at, row in enumerate(picked.values()) if row.measured),
    )


def pick(encoded: Sequence[Encoded], heads: Sequence[int]) -> dict[int, MeasuredRow]:
    """Which conversations are measured, by their place, and the part of each.

    As much context as lets FEWEST_ANSWER_TOKENS fit into MAX_TOKENS; with the least context, more
    rows than that where there have to be.
    """
    found: dict[int, MeasuredRow] = {}
    for context in CONTEXTS:
        pairs = zip(encoded, heads, strict=True)
        parts = [measured_part(item, head, context) for item, head in pairs]
        found = within_budget(parts, MAX_TOKENS if context != CONTEXTS[-1] else None)
        enough = sum(len(row.measured) for row in found.values()) >= FEWEST_ANSWER_TOKENS
        if enough or len(found) == len(parts):
            break
    return found


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of them, at equal distances, in their order."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def measured_part(encoded: Encoded, head: int, context: int) -> MeasuredRow:
    """The first answer tokens of a conversation, with about `context` tokens before them.

    `head` is how many tokens come before the first question; they stay, at most `context` of them.
    What is cut is the beginning of what follows.
    """
    learnt = [i for i, label in enumerate(encoded.labels) if label != IGNORED and i > 0]
    learnt = learnt[:MAX_ANSWER_TOKENS_OF_ROW]
    end = learnt[-1] + 1 if learnt else 0
    most = context + len(learnt)
    if end <= most:
        return MeasuredRow(ids=tuple(encoded.ids[:end]), measured=tuple(learnt))
    head = min(head, context)
    start = max(head, end - (most - head))
    moved = tuple(i - start + head for i in learnt if i > start)
    return MeasuredRow(ids=tuple(encoded.ids[:head] + encoded.ids[start:end]), measured=moved)


def _head(tokenizer: PreTrainedTokenizerBase, example: Example, encoded: Encoded) -> int:
    """How many tokens begin the conversation, whatever is asked: BOS, system prompt, tools."""
    if len(encoded.ids) <= CONTEXTS[-1] or is_document(example):
        return 0  # never cut
    before = list(takewhile(lambda turn: turn["role"] == "system", example["prompt"]))
    asked: Message = {"role": "user", "content": OTHER_QUESTION}
    other: Example = {**example, "prompt": [*before, asked]}
    ids = tokenizer(render_example(tokenizer, other), add_special_tokens=False)["input_ids"]
    return common_length(encoded.ids, ids)


def within_budget(rows: Sequence[MeasuredRow], most: int | None) -> dict[int, MeasuredRow]:
    """As many rows as the answers' budget takes, and `most` tokens in all, by their place.

    Without `most` it is FEWEST_ANSWER_TOKENS that they have to come to.
    """
    wanted = MAX_ANSWER_TOKENS if most else FEWEST_ANSWER_TOKENS
    answers = sum(len(row.measured) for row in rows)
    tokens = sum(len(row.ids) for row in rows)
    share = min(1.0, wanted / max(answers, 1), most / max(tokens, 1) if most else 1.0)
    found: dict[int, MeasuredRow] = {}
    left = wanted
    for place in spread(range(len(rows)), math.ceil(share * len(rows))):
        row = rows[place]
        if row.measured:
            measured = row.measured[:left]
            if not measured:
                break
            row = MeasuredRow(ids=row.ids[: measured[-1] + 1], measured=measured)
        if most is not None and len(row.ids) > most:
            continue  # a shorter one may fit
        left -= len(row.measured)
        most = None if most is None else most - len(row.ids)
        found[place] = row
    return found


# --- Samples -----------------------------------------------------------------------------------

SAMPLES = 10
LONGEST_PROMPT = 1024  # tokens
PROMPT_TOKENS = 4096  # of all prompts
SHOWN_TEXT = 600  # characters of how plain text goes on: about as many as a sample's answer has


@dataclass(frozen=True)
class Prompt:
    """What a model is asked, for people to read its answer; of plain text, its beginning."""

    example: Example
    ids: tuple[int, ...]

    def sample(self, base: str | None, tuned: Generated | None) -> Sample:
        """With the answers of both models; None where one was not asked."""
        question, expected = question_of(self.example), said(self.example["completion"][-1])
        if is_document(self.example):
            question, rest = begun_and_rest(expected)
            expected = rest if len(rest) <= SHOWN_TEXT else f"{rest[:SHOWN_TEXT]}…"
        return Sample(
            prompt=question,
            expected=expected,
            base=base,
            tuned=tuned.text if tuned else None,
            stopped=tuned is not None and tuned.stopped,
        )


def prompts_of(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> tuple[Prompt, ...]:
    """The prompts of some of the rows, none of them long."""
    found = []
    for example in examples:
        text = render_prompt(tokenizer, example)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if 0 < len(ids) <= LONGEST_PROMPT:
            found.append(Prompt(example, tuple(ids)))
    chosen = spread(found, SAMPLES)
    while sum(len(prompt.ids) for prompt in chosen) > PROMPT_TOKENS:
        chosen.pop()
    return tuple(chosen)


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
