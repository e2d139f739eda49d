"""The files of examples: finding them, fetching one version of each, and reading their rows."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune_trainer.contract import (
    Dataset,
    DetectedFile,
    Example,
    Reason,
    StageError,
    Storage,
    as_example,
)
from finetune_trainer.prepare.reading import Problems, Source, open_source
from finetune_trainer.prepare.split import Hashes, row_hash
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import FileInfo, Folder, open_folder, split


@dataclass(frozen=True)
class DataFile:
    """A file of examples at one version."""

    uri: str
    folder: Folder
    info: FileInfo

    def fetch(self, target: Path, reporter: Reporter) -> bool:
        """Bring the file to disk; false when the version that was found is gone."""
        on_bytes = reporter.transfer(f"Fetching {self.uri}", self.info.size)
        try:
            self.folder.download(self.info.path, target, on_bytes)
        except FileNotFoundError:
            return False
        return self.folder.stat(self.info.path) == self.info


@dataclass(frozen=True)
class DataFiles:
    """The dataset, and the file with held-out rows if the spec names one."""

    rows: DataFile
    held_out: DataFile | None


def find_data_files(dataset: Dataset, storage: Storage) -> DataFiles:
    """Find the files; raises StageError(DatasetNotFound) and the store's reasons."""
    rows = _find(dataset.source, "spec.dataset.source", storage)
    held_out = None
    if dataset.eval_source is not None:
        held_out = _find(dataset.eval_source, "spec.dataset.evalSource", storage)
    return DataFiles(rows, held_out)


def _find(uri: str, field: str, storage: Storage) -> DataFile:
    parent, name = split(uri)
    folder = open_folder(parent, storage)
    info = folder.stat(name) if name else None
    if info is None:
        raise StageError(
            Reason.DATASET_NOT_FOUND,
            f"There is no dataset at {uri}: upload the file there, or correct {field}.",
        )
    return DataFile(uri, folder, info)


class DatasetRows:
    """The usable rows of one file, and the problems of the others."""

    def __init__(self, file: DataFile, local: Path) -> None:
        self.file = file
        self.problems = Problems()
        self.has_system = False
        """Whether any row has a system prompt."""
        self._local = local
        self._spool = local.with_name(f"{local.name}.rows")
        self._numbers, self._hashes = array("I"), array("Q")
        self._source: Source | None = None

    def load(self, dataset: Dataset, seed: int) -> None:
        """Read the file; raises StageError for what is wrong with it."""
        self._source = open_source(self._local, dataset, self.file.uri)
        with self._spool.open("w", encoding="ascii") as out:
            for record in self._source.records(self.problems):
                self._numbers.append(record.number)
                self._hashes.append(row_hash(record.messages, seed, record.tools))
                self.has_system = self.has_system or record.messages[0]["role"] == "system"
                out.write(json.dumps(as_example(record.messages, record.tools)) + "\n")

    def refuse(self, refused: dict[int, str]) -> None:
        """Note more rows that can't be used, cause by number; raises StageError as the reader."""
        for number, cause in refused.items():
            self.problems.add(number, cause)
        if refused and self._source:
            self._source.check(self.problems)

    @property
    def detected(self) -> DetectedFile | None:
        return self._source.detected if self._source else None

    @property
    def numbers(self) -> npt.NDArray[np.uint32]:
        """Number of each usable row in its file, as the reader counts."""
        return np.array(self._numbers, dtype=np.uint32)

    @property
    def hashes(self) -> Hashes:
        return np.array(self._hashes, dtype=np.uint64)

    @property
    def total(self) -> int:
        """Rows in the file, usable or not; while it is read, those so far."""
        return self._source.rows if self._source else 0

    def examples(self) -> Iterator[Example]:
        """The usable rows, in the order of `numbers`."""
        with self._spool.open(encoding="ascii") as lines:
            for line in lines:
                yield json.loads(line)
