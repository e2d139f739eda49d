"""What `prepare` found in the dataset: in status, and as dataset-report.json."""

from __future__ import annotations

from finetune_trainer.contract.base import Base


class BadRow(Base):
    """A row of the dataset that can't be used."""

    row: int
    """Number of the row or line, as a spreadsheet or editor counts: the header is 1."""

    cause: str
    """What is wrong with it."""


class DatasetSummary(Base):
    """What `prepare` found in the dataset; dataset-report.json in the output has all of it."""

    rows: int = 0
    """Rows in the file."""

    examples: int = 0
    """Rows that are trained on."""

    eval_examples: int = 0
    """Rows that are held out."""

    invalid: int = 0
    """Rows that can't be used."""

    duplicates: int = 0
    """Rows that say the same as an earlier one; where a bad row makes it fail, those before it."""

    truncated: int = 0
    """Examples longer than training.maxSequenceLength."""

    tokens: int = 0
    """Tokens of one pass over the examples."""

    first_invalid: tuple[BadRow, ...] = ()
    """The first ten rows that can't be used."""
