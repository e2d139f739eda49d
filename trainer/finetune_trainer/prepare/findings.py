"""What was found in the dataset: dataset-report.json for people, and a summary for status."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import numpy.typing as npt

from finetune_trainer.contract import (
    Base,
    ChatTemplate,
    Conversations,
    DatasetReport,
    DatasetSummary,
    FileReport,
    LengthSpread,
    RunConfig,
    Split,
)
from finetune_trainer.prepare.dataset_files import DatasetRows, Mask, repeated, shared
from finetune_trainer.store.marker import DATASET_REPORT

if TYPE_CHECKING:  # it imports transformers, which takes seconds
    from finetune_trainer.prepare.examples import EncodedRows

FIRST_INVALID = 10  # bad rows in status

TokenCounts = npt.NDArray[np.uint32]
"""Tokens of each example of a file."""

BINS = 32  # of a histogram


class LengthBin(Base):
    up_to: int
    """The longest length that counts here, in tokens; the bin before ends where this begins."""

    rows: int


class TokenStats(Base):
    """TokenCounts of the examples as they are trained on: cut at training.maxSequenceLength."""

    count: int
    """Examples."""

    total: int
    """Tokens of one pass over them."""

    max: int
    p95: int
    histogram: tuple[LengthBin, ...]


def token_stats(lengths: TokenCounts, limit: int) -> TokenStats:
    """Statistics of lengths that are cut at `limit`."""
    cut = np.minimum(lengths, limit)
    return TokenStats(
        count=len(cut),
        total=int(cut.sum(dtype=np.uint64)),
        max=int(cut.max(initial=0)),
        p95=percentile(cut, 95),
        histogram=histogram(cut),
    )


def histogram(lengths: TokenCounts) -> tuple[LengthBin, ...]:
    """Rows by length in up to BINS bins of one width; empty bins are there as well."""
    if not len(lengths):
        return ()
    width = -(-max(int(lengths.max()), 1) // BINS)
    rows = np.bincount((lengths.astype(np.int64) + width - 1) // width)
    counts = [int(rows[0]) + int(rows[1]) if len(rows) > 1 else int(rows[0]), *rows[2:].tolist()]
    return tuple(
        LengthBin(up_to=width * (number + 1), rows=count) for number, count in enumerate(counts)
    )


def spread(lengths: TokenCounts) -> LengthSpread | None:
    """Minimum, middle, upper end and sum."""
    if not len(lengths):
        return None
    return LengthSpread(
        min=int(lengths.min()),
        median=float(np.median(lengths)),
        mean=round(float(lengths.mean()), 1),
        p95=percentile(lengths, 95),
        p99=percentile(lengths, 99),
        max=int(lengths.max()),
        total=int(lengths.sum(dtype=np.uint64)),
    )


def percentile(lengths: TokenCounts, percent: int) -> int:
    """The length that `percent` of the rows don't exceed: always one that is there."""
    if not len(lengths):
        return 0
    rank = -(-len(lengths) * percent // 100) - 1
    return int(np.partition(lengths, rank)[rank])


def length_that_fits(lengths: TokenCounts, allowed: int) -> int:
    """The smallest maximum that no more than `allowed` rows exceed."""
    rank = len(lengths) - 1 - min(allowed, len(lengths) - 1)
    return int(np.partition(lengths, rank)[rank])


class Prepared(Base):
    """summary.json: what later runs need to know of the examples."""

    dataset: DatasetSummary
    left_out: int
    """Rows without an answer within the maximum length."""

    shared: int
    """Held-out rows of dataset.evalSource that are trained on as well."""

    tokens: TokenStats
    """Of the examples that are trained on."""

    notice: str = ""
    """What llama.cpp makes of the first rows, where that is worth knowing."""

    split_into: int | None = None
    """Rows that plain text beyond the maximum length makes; left out of other data."""


@dataclass
class Findings:
    """What is known so far; a failure reports as much as there is."""

    config: RunConfig
    rows: DatasetRows
    eval_rows: DatasetRows | None = None
    examples: EncodedRows | None = None
    eval_examples: EncodedRows | None = None
    template: ChatTemplate | None = None
    notice: str = ""
    """See Prepared."""

    def all_rows(self) -> list[DatasetRows]:
        return [self.rows, *([self.eval_rows] if self.eval_rows else [])]

    def summary(self) -> DatasetSummary:
        """The counts, and the first bad rows."""
        found = [e for e in (self.examples, self.eval_examples) if e]
        examples = self.examples
        first = list(self.rows.problems.first)
        if self.eval_rows:
            first += [
                bad.model_copy(update={"cause": f"evalSource: {bad.cause}"})
                for bad in self.eval_rows.problems.first
            ]
        return DatasetSummary(
            rows=self.rows.total,
            examples=len(examples.trained) if examples else 0,
            eval_examples=sum(e.held_out for e in found),
            invalid=sum(rows.problems.count for rows in self.all_rows()),
            duplicates=int(np.count_nonzero(repeated(self.rows.hashes))),
            truncated=sum(int(np.count_nonzero(e.too_long)) for e in found),
            tokens=self.tokens.total if examples else 0,
            first_invalid=tuple(first[:FIRST_INVALID]),
        )

    @property
    def tokens(self) -> TokenStats:
        """Statistics of the examples that are trained on."""
        assert self.examples  # noqa: S101 - asked for when they are there
        stats = token_stats(self.examples.trained, self.examples.limit)
        return stats.model_copy(update={"total": self.examples.trained_tokens})

    def prepared(self) -> Prepared:
        found = [e for e in (self.examples, self.eval_examples) if e]
        return Prepared(
            dataset=self.summary(),
            left_out=sum(int(np.count_nonzero(e.left_out)) for e in found),
            shared=int(np.count_nonzero(self._shared())),
            tokens=self.tokens,
            notice=self.notice,
            split_into=sum(e.split_into for e in found) or None,
        )

    def report(self) -> DatasetReport:
        """Everything but the bad rows."""
        summary = self.summary()
        return DatasetReport(
            **_file(self.rows, self.examples),
            examples=summary.examples,
            eval_examples=summary.eval_examples,
            duplicates=self.rows.listed(repeated(self.rows.hashes)),
            split=self._split() if self.examples else None,
            chat_template=None if self.examples and self.examples.documents else self.template,
            eval_source=FileReport(**_file(self.eval_rows, self.eval_examples))
            if self.eval_rows
            else None,
        )

    def write(self, folder: Path) -> None:
        """Write dataset-report.json: one key a line, the bad rows last, one a line as well."""
        report = self.report().model_dump(mode="json", exclude_none=True)
        with (folder / DATASET_REPORT).open("w", encoding="utf-8") as out:
            out.write("{\n")
            for key, value in report.items():
                out.write(f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)},\n")
            if self.eval_rows:
                _write_invalid(out, "evalSourceInvalidRows", self.eval_rows)
                out.write(",\n")
            _write_invalid(out, "invalidRows", self.rows)
            out.write("\n}\n")

    def _split(self) -> Split:
        dataset = self.config.dataset
        if self.eval_rows:
            return Split(
                by="evalSource",
                eval_source=dataset.eval_source,
                also_trained_on=self.eval_rows.listed(self._shared()),
            )
        assert self.examples  # noqa: S101 - there is no split before
        return Split(
            by="evalFraction",
            eval_fraction=dataset.eval_fraction,
            seed=self.config.training.seed,
            held_out=self.rows.listed(self.examples.held & self.examples.used),
        )

    def _shared(self) -> Mask:
        if self.eval_rows is None:
            return np.zeros(0, dtype=np.bool_)
        return shared(self.eval_rows.hashes, self.rows.hashes)


def _file(rows: DatasetRows, examples: EncodedRows | None) -> dict[str, Any]:
    """The fields of a FileReport, as far as they are known."""
    found: dict[str, Any] = {
        "source": rows.file.uri,
        "etag": rows.file.info.etag,
        "shards": rows.shards,
        "detected": rows.detected,
        "rows": rows.total,
        "invalid": rows.problems.count,
    }
    if (odd := rows.oddities) is not None:
        found |= {"blank_rows": odd.blank, "short_rows": odd.short, "long_rows": odd.long}
    if examples is None:
        return found
    used = examples.used
    tokens = token_stats(examples.lengths[used], examples.limit)
    return found | {
        "max_sequence_length": examples.limit,
        "truncated": examples.rows.listed(examples.too_long & used),
        "left_out": examples.rows.listed(examples.left_out),
        "tokens": spread(examples.lengths[used]),
        "answer_tokens": spread(examples.answers[used]),
        "tokens_after_cutting": int(examples.whole[used].sum(dtype=np.uint64)),
        "histogram": tuple((bin_.up_to, bin_.rows) for bin_ in tokens.histogram),
        "conversations": Conversations(
            with_several_answers=examples.conversations,
            only_last_answer_learnt=examples.only_last,
            some_answers_not_learnt=examples.some_left or None,
            earlier_reasoning_left_out=examples.reasoning_left_out or None,
        ),
    }


def _write_invalid(out: TextIO, key: str, rows: DatasetRows) -> None:
    out.write(f"  {json.dumps(key)}: [")
    for index, bad in enumerate(rows.problems):
        out.write(",\n    " if index else "\n    ")
        out.write(json.dumps(bad.model_dump(exclude_none=True), ensure_ascii=False))
    out.write("\n  ]" if rows.problems.count else "]")
