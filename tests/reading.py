"""A dataset of one file, for the tests of the reader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from finetune_trainer.contract import Dataset
from finetune_trainer.prepare.reading import Problems, Record, Source, open_shards


def open_source(file: Path, dataset: Dataset, uri: str) -> Source:
    """Raises as open_shards."""
    return open_shards([(file, uri)], dataset, uri)


def read_records(file: Path, dataset: Dataset, uri: str, problems: Problems) -> Iterator[Record]:
    """Open the file and read its records, as Source.records does."""
    return open_source(file, dataset, uri).records(problems)
