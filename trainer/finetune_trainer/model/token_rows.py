"""Rows in tokens, as a training reads them: an Arrow file that is mapped into memory.

`prepare` tokenizes every row to count it, and leaves the tokens beside the examples. A training
takes them where `TokensOf` says that they are what it would make itself; else it writes such a file
of its own. The columns of a row:

input_ids         tokens of the conversation, cut at the limit; of a pair (dpo, orpo) the chosen one
learnt            of each token, whether it is learnt
rejected_ids      tokens of a pair's other conversation
rejected_learnt   of each of them, whether it is learnt
desirable         the row's label (kto)
targets           tokens that count for the loss; of a pair, of the answer that has fewer
end               whether the row teaches the end of a turn
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import Base, Example, Objective, digest, is_document
from finetune_trainer.model.tokenizer import IGNORED, Encoded, end_of_turn_ids, pieces

FORMAT = 1  # of the file; raised when its columns or their meaning change
ROWS_AT_ONCE, TOKENS_AT_ONCE = 500, 1_000_000  # held as lists before they are written

_ABOUT = b"finetune.dev/tokens"  # key of the schema's metadata
_LIBRARIES = ("jinja2", "tokenizers", "transformers")
_PAIRS: frozenset[Objective] = frozenset({"dpo", "orpo"})


class TokensOf(Base):
    """What tokens were made with and for. Where all of it is the same, so are the tokens.

    The rows are not part of it: the marker of `prepare` lists the examples beside the tokens.
    """

    format: int = FORMAT
    tokenizer: str
    """See `tokenizer_digest`."""

    objective: Objective
    max_length: int
    """Tokens at which conversations are cut."""

    split_at: int
    """Tokens at which plain text is split into rows, which are cut at `max_length` as well."""

    def differs(self, other: TokensOf) -> str:
        """The fields, by name, in which the other one differs."""
        return ", ".join(
            name for name in type(self).model_fields if getattr(self, name) != getattr(other, name)
        )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what turns a conversation into tokens: vocabulary and rules, chat template, and
    the versions of the libraries that apply them."""
    rules: Any = tokenizer.get_vocab()
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        # Each call sets these anew, and a digest may not depend on the last one.
        backend.no_truncation()
        backend.no_padding()
        rules = backend.to_str()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    libraries = {name: version(name) for name in _LIBRARIES}
    kind = type(tokenizer).__name__
    return digest([kind, rules, tokenizer.chat_template, special, libraries])


def tokens_of(
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    max_length: int,
    split_at: int | None = None,
) -> TokensOf:
    """The tokens that this tokenizer makes; plain text is split at `max_length` if left out."""
    return TokensOf(
        tokenizer=tokenizer_digest(tokenizer),
        objective=objective,
        max_length=max_length,
        split_at=split_at or max_length,
    )


def read_about(file: Path) -> TokensOf | None:
    """What the tokens in a file were made with; None where it is no such file."""
    try:
        with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
            about = (reader.schema.metadata or {})[_ABOUT]
        return TokensOf.model_validate_json(about)
    except (OSError, pa.ArrowInvalid, KeyError, ValidationError):
        return None


@dataclass(frozen=True)
class RowMaker:
    """Makes the rows of a file out of examples."""

    tokenizer: PreTrainedTokenizerBase
    of: TokensOf

    @cached_property
    def _ends(self) -> set[int]:
        return end_of_turn_ids(self.tokenizer)

    def rows(self, example: Example, sides: Sequence[Encoded]) -> Iterator[dict[str, Any]]:
        """The rows of an example: of plain text one for each part, with kto two of a pair."""
        limit = self.of.max_length
        if is_document(example):
            for part in pieces(len(sides[0].ids), self.of.split_at):
                document = replace(sides[0], ids=sides[0].ids[part], labels=sides[0].labels[part])
                yield _cut(document, limit, {int(self.tokenizer.eos_token_id)})
            return
        cut = [_cut(side, limit, self._ends) for side in sides]
        if self.of.objective == "kto":
            # The first of a pair is the chosen answer.
            for desirable, row in zip((example.get("label", True), False), cut):  # noqa: B905
                yield {**row, "desirable": desirable}
        elif len(cut) == 1:
            yield cut[0]
        else:
            yield _pair_of(*cut)


def _cut(side: Encoded, max_length: int, ends: set[int]) -> dict[str, Any]:
    labels = side.labels[:max_length]
    return {
        "input_ids": side.ids[:max_length],
        "learnt": labels,
        # The first token is predicted from nothing.
        "targets": max(len(labels) - 1, 0) - labels[1:].count(IGNORED),
        "end": not ends.isdisjoint(labels),
    }


def _pair_of(chosen: dict[str, Any], rejected: dict[str, Any]) -> dict[str, Any]:
    return {
        **chosen,
        "rejected_ids": rejected["input_ids"],
        "rejected_learnt": rejected["learnt"],
        "targets": min(chosen["targets"], rejected["targets"]),
    }


class TokensWriter:
    """Writes the rows of examples to a file. Where there is no example, there is no file."""

    def __init__(self, file: Path, tokenizer: PreTrainedTokenizerBase, of: TokensOf) -> None:
        self._file = file
        self._maker = RowMaker(tokenizer, of)
        self._schema = schema_of(of)
        self._rows: list[dict[str, Any]] = []
        self._tokens = 0
        self._writer: pa.RecordBatchStreamWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None and self._rows:
            self._flush()
        if self._writer:
            self._writer.close()

    def add(self, example: Example, sides: Sequence[Encoded]) -> None:
        """Add an example; `sides` are what `encode_sides` made of it."""
        for row in self._maker.rows(example, sides):
            self._rows.append(row)
            self._tokens += len(row["input_ids"])
            if len(self._rows) == ROWS_AT_ONCE or self._tokens >= TOKENS_AT_ONCE:
                self._flush()

    def _flush(self) -> None:
        self._writer = self._writer or pa.ipc.new_stream(str(self._file), self._schema)
        columns = [_column([row[each.name] for row in self._rows], each) for each in self._schema]
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        self._rows, self._tokens = [], 0


def schema_of(of: TokensOf) -> pa.Schema:
    """The columns of the rows, and what they were made with."""
    sides = [("input_ids", "learnt")]
    if of.objective in _PAIRS:
        sides.append(("rejected_ids", "rejected_learnt"))
    columns = [
        pair
        for ids, learnt in sides
        for pair in ((ids, pa.list_(pa.int32())), (learnt, pa.list_(pa.bool_())))
    ]
    if of.objective == "kto":
        columns.append(("desirable", pa.bool_()))
    columns += [("targets", pa.int32()), ("end", pa.bool_())]
    return pa.schema(columns, metadata={_ABOUT: of.model_dump_json()})


def _column(values: list[Any], field: pa.Field) -> pa.Array:
    if field.type != pa.list_(pa.bool_()):
        return pa.array(values, field.type)
    labels = pa.array(values, pa.list_(pa.int32()))
    return pa.ListArray.from_arrays(labels.offsets, pc.not_equal(labels.values, IGNORED))


def with_labels(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The same columns with labels in place of `learnt`: the token, or IGNORED."""
    found = dict(rows)
    for ids, learnt, labels in (
        ("input_ids", "learnt", "labels"),
        ("rejected_ids", "rejected_learnt", "rejected_labels"),
    ):
        if learnt in found:
            marks = found.pop(learnt)
            found[labels] = [
                [token if is_learnt else IGNORED for token, is_learnt in zip(*row, strict=True)]
                for row in zip(found[ids], marks, strict=True)
            ]
    return found
