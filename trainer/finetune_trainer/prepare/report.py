"""What was found in the dataset: dataset-report.json for people, and a summary for status."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from finetune_trainer.contract import BadRow, Base, DatasetSummary, RunConfig
from finetune_trainer.prepare.rows import Rows
from finetune_trainer.prepare.split import Mask, repeated, shared
from finetune_trainer.prepare.statistics import TokenStats, spread, token_stats
from finetune_trainer.store.marker import DATASET_REPORT

if TYPE_CHECKING:  # it imports transformers, which takes seconds
    from finetune_trainer.prepare.examples import Examples

SUMMARY = "summary.json"
FIRST_INVALID = 10  # bad rows in status


class Prepared(Base):
    """summary.json: what later runs need to know of the examples."""

    dataset: DatasetSummary
    left_out: int
    """Rows without an answer within the maximum length."""

    shared: int
    """Held-out rows of dataset.evalSource that are trained on as well."""

    tokens: TokenStats
    """Of the examples that are trained on."""


@dataclass
class Findings:
    """What is known so far; a failure reports as much as there is."""

    config: RunConfig
    rows: Rows
    eval_rows: Rows | None = None
    examples: Examples | None = None
    eval_examples: Examples | None = None
    template: dict[str, Any] | None = None

    def all_rows(self) -> list[Rows]:
        """The files that are read."""
        return [self.rows, *([self.eval_rows] if self.eval_rows else [])]

    def summary(self) -> DatasetSummary:
        """The counts, and the first bad rows."""
        found = [e for e in (self.examples, self.eval_examples) if e]
        examples = self.examples
        first = list(self.rows.problems.first)
        if self.eval_rows:
            first += [
                BadRow(row=bad.row, cause=f"evalSource: {bad.cause}")
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
        return token_stats(self.examples.trained, self.examples.limit)

    def prepared(self) -> Prepared:
        """What summary.json holds."""
        found = [e for e in (self.examples, self.eval_examples) if e]
        return Prepared(
            dataset=self.summary(),
            left_out=sum(int(np.count_nonzero(e.left_out)) for e in found),
            shared=int(np.count_nonzero(self._shared())),
            tokens=self.tokens,
        )

    def report(self) -> dict[str, Any]:
        """Everything but the bad rows."""
        summary = self.summary()
        report: dict[str, Any] = {
            **_file(self.rows),
            "examples": summary.examples,
            "evalExamples": summary.eval_examples,
            "duplicates": _listed(self.rows, repeated(self.rows.hashes)),
        }
        if self.examples:
            report |= _lengths(self.examples)
            report["split"] = self._split()
        if self.template:
            report["chatTemplate"] = self.template
        if self.eval_rows:
            report["evalSource"] = _file(self.eval_rows)
        if self.eval_examples:
            report["evalSource"] |= _lengths(self.eval_examples)
        return report

    def write(self, folder: Path) -> None:
        """Write dataset-report.json: one key a line, the bad rows last, one a line as well."""
        with (folder / DATASET_REPORT).open("w", encoding="utf-8") as out:
            out.write("{\n")
            for key, value in self.report().items():
                out.write(f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)},\n")
            if self.eval_rows:
                _write_invalid(out, "evalSourceInvalidRows", self.eval_rows)
                out.write(",\n")
            _write_invalid(out, "invalidRows", self.rows)
            out.write("\n}\n")

    def _split(self) -> dict[str, Any]:
        dataset = self.config.dataset
        if self.eval_rows:
            common = self._shared()
            return {
                "by": "evalSource",
                "evalSource": dataset.eval_source,
                "alsoTrainedOn": _listed(self.eval_rows, common),
            }
        assert self.examples  # noqa: S101 - there is no split before
        return {
            "by": "evalFraction",
            "evalFraction": dataset.eval_fraction,
            "seed": self.config.training.seed,
            "heldOut": _listed(self.rows, self.examples.held & self.examples.used),
        }

    def _shared(self) -> Mask:
        if self.eval_rows is None:
            return np.zeros(0, dtype=np.bool_)
        return shared(self.eval_rows.hashes, self.rows.hashes)


def _file(rows: Rows) -> dict[str, Any]:
    return {
        "source": rows.file.uri,
        "etag": rows.file.etag,
        "detected": rows.detected,
        "rows": rows.total,
        "invalid": rows.problems.count,
    }


def _lengths(examples: Examples) -> dict[str, Any]:
    used = examples.used
    tokens = token_stats(examples.lengths[used], examples.limit)
    return {
        "maxSequenceLength": examples.limit,
        "truncated": _listed(examples.rows, examples.too_long & used),
        "leftOut": _listed(examples.rows, examples.left_out),
        "tokens": spread(examples.lengths[used]),
        "answerTokens": spread(examples.answers[used]),
        "tokensAfterCutting": tokens.total,
        "histogram": [[bin_.up_to, bin_.rows] for bin_ in tokens.histogram],
        "conversations": {
            "withSeveralAnswers": examples.conversations,
            "onlyLastAnswerLearnt": examples.only_last,
        },
    }


def _listed(rows: Rows, mask: Mask) -> dict[str, Any]:
    numbers = rows.numbers[mask].tolist()
    return {"count": len(numbers), "rows": numbers}


def _write_invalid(out: TextIO, key: str, rows: Rows) -> None:
    out.write(f"  {json.dumps(key)}: [")
    for index, bad in enumerate(rows.problems):
        out.write(",\n    " if index else "\n    ")
        out.write(json.dumps(bad.model_dump(), ensure_ascii=False))
    out.write("\n  ]" if rows.problems.count else "]")
