"""The first pass over a file of examples: what can be used is spooled to disk, row by row.

Only a number and a hash of each row stay in memory (12 bytes), so that a million rows fit.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from finetune_trainer.config import Dataset
from finetune_trainer.outcome import BadRow
from finetune_trainer.prepare.dataset import read_csv
from finetune_trainer.prepare.inputs import DataFile
from finetune_trainer.prepare.split import Hashes, row_hash
from finetune_trainer.prepare.statistics import Lengths

Messages = list[dict[str, str]]


class Problems:
    """Rows that can't be used."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[BadRow] = []

    def __iter__(self) -> Iterator[BadRow]:
        """All of them."""
        return iter(self.first)


class Rows:
    """The rows of one file: those that can be used, and the problems of those that can't."""

    def __init__(self, file: DataFile, local: Path) -> None:
        self.file = file
        self.problems = Problems()
        self.detected: dict[str, object] = {}
        self.has_system = False
        """Whether any row has a system prompt."""
        self._local = local
        self._spool = local.with_name(f"{local.name}.rows")
        self._numbers, self._hashes = array("I"), array("Q")

    def load(self, dataset: Dataset, seed: int) -> None:
        """Read the file; raises StageError for what is wrong with it."""
        with self._spool.open("w", encoding="ascii") as out:
            for number, messages in _records(self._local, dataset, self.file.uri):
                self._numbers.append(number)
                self._hashes.append(row_hash(messages, seed))
                self.has_system = self.has_system or messages[0]["role"] == "system"
                out.write(json.dumps(messages) + "\n")

    @property
    def numbers(self) -> Lengths:
        """Number of each usable row in its file; the header is 1."""
        return np.array(self._numbers, dtype=np.uint32)

    @property
    def hashes(self) -> Hashes:
        """Hash of each usable row."""
        return np.array(self._hashes, dtype=np.uint64)

    @property
    def total(self) -> int:
        """Rows in the file, usable or not; while it is read, those so far."""
        return len(self._numbers) + self.problems.count

    def messages(self) -> Iterator[Messages]:
        """The usable rows, in the order of `numbers`."""
        with self._spool.open(encoding="ascii") as lines:
            for line in lines:
                yield json.loads(line)


def _records(local: Path, dataset: Dataset, uri: str) -> Iterator[tuple[int, Messages]]:
    system = [{"role": "system", "content": dataset.system_prompt}] if dataset.system_prompt else []
    for row in read_csv(local, dataset.columns, uri):
        pair = [
            {"role": "user", "content": row.instruction},
            {"role": "assistant", "content": row.response},
        ]
        yield row.number, [*system, *pair]
