"""Rows become examples; their tokens are counted, and what is too long is found."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune_trainer.base_model.tokenizer import (
    IGNORED,
    encode,
    end_of_turn_ids,
    message_pair,
)
from finetune_trainer.outcome import Reason, StageError
from finetune_trainer.prepare.dataset import Row


@dataclass(frozen=True)
class Prepared:
    """The examples that will be trained on, and what they look like in tokens."""

    examples: list[dict[str, Any]]
    report: dict[str, Any]


def build_examples(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Prepared:
    """Apply the chat template to every row.

    A row longer than `max_length` tokens is cut there by the training; one whose answer would be
    cut off entirely is left out, since it would teach nothing. Raises StageError when no row is
    left or the template does not mark the end of an answer.
    """
    check_template(tokenizer)
    examples, lengths, answers, dropped = [], [], [], []
    for row, ids, labels in _encoded(rows, tokenizer):
        if all(label == IGNORED for label in labels[:max_length]):
            dropped.append(row.number)
            continue
        examples.append(message_pair(row.instruction, row.response))
        lengths.append(len(ids))
        answers.append(sum(label != IGNORED for label in labels))
    if not examples:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"In none of the {len(rows)} rows does an answer begin within maxSequenceLength "
            f"({max_length} tokens): raise spec.training.maxSequenceLength.",
        )
    report = {
        "rows": len(rows),
        "examples": len(examples),
        "maxSequenceLength": max_length,
        "truncated": sum(length > max_length for length in lengths),
        "leftOut": len(dropped),
        "leftOutRows": dropped[:100],
        "tokens": _spread(lengths),
        "answerTokens": _spread(answers),
        "duplicates": len(rows) - len({(row.instruction, row.response) for row in rows}),
    }
    return Prepared(examples, report)


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that the chat template takes a question and ends an answer with a token."""
    try:
        ends = end_of_turn_ids(tokenizer)
    except Exception as error:  # Jinja runs the model's own template: anything can come out
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            f"The base model's chat template fails on a user's question and an answer: {error} "
            "Correct chat_template in tokenizer_config.json or chat_template.jinja.",
        ) from error
    if not ends:
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            "The base model's chat template puts no special token behind an answer, so a tuned "
            "model would never stop: let the template end it with the eos_token.",
        )


def write_examples(prepared: Prepared, folder: Path) -> None:
    """Write examples.jsonl, one example a line, and dataset-report.json."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "examples.jsonl").open("w", encoding="utf-8") as lines:
        for example in prepared.examples:
            lines.write(json.dumps(example, ensure_ascii=False) + "\n")
    (folder / "dataset-report.json").write_text(
        json.dumps(prepared.report, indent=2) + "\n", encoding="utf-8"
    )


def _encoded(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Row, list[int], list[int]]]:
    for row in rows:
        yield row, *encode(tokenizer, message_pair(row.instruction, row.response))


def _spread(values: list[int]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "min": ordered[0],
        "median": statistics.median(ordered),
        "p95": ordered[min(len(ordered) * 95 // 100, len(ordered) - 1)],
        "max": ordered[-1],
        "total": sum(ordered),
    }
