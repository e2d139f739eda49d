"""The files of examples: finding them, fetching one version of each, and reading their rows."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from finetune_trainer.contract import (
    HUB_DATASETS,
    Dataset,
    DetectedFile,
    Example,
    ListedRows,
    Message,
    Objective,
    Reason,
    ShardReport,
    StageError,
    Storage,
    Tool,
    as_example,
    digest,
)
from finetune_trainer.prepare.reading import Problems, Source, open_shards
from finetune_trainer.prepare.reading.record import Oddities, shard_and_row
from finetune_trainer.prepare.shards import find_hub_dataset, find_shards, is_pattern
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import FileInfo, OnBytes, open_folder, split

Hashes = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]


class Files(Protocol):
    """Where the files of a dataset are: a folder in a store, or a repository on the Hub."""

    def uri_of(self, path: str) -> str:
        """The full name of a file."""

    def stat(self, path: str) -> FileInfo | None:
        """Size and ETag; None when the file is not there."""

    def download(self, path: str, target: Path, on_bytes: OnBytes | None = None) -> None:
        """Copy a file to disk; FileNotFoundError when it is missing."""


@dataclass(frozen=True)
class DataFile:
    """What a source of examples names, at one version: a file, or several that are read as one."""

    uri: str
    folder: Files
    infos: Sequence[FileInfo]
    several: bool = False
    """Whether messages and reports name the file with a row."""

    @property
    def info(self) -> FileInfo:
        """The file; for several, their size and a digest over their ETags."""
        if not self.several:
            return self.infos[0]
        etags = [[info.path, info.etag] for info in self.infos]
        return FileInfo(self.uri, sum(i.size for i in self.infos), f"sha256:{digest(etags)}")

    @property
    def shards(self) -> Sequence[str]:
        """Names of the files, where they are several."""
        return [info.path for info in self.infos] if self.several else []

    def locals(self, target: Path) -> list[tuple[Path, str]]:
        """Where each file lies below `target` once it is fetched, and its URI."""
        if not self.several:
            return [(target, self.uri)]
        return [
            (target / f"{index:05d}", self.folder.uri_of(info.path))
            for index, info in enumerate(self.infos)
        ]

    def fetch(self, target: Path, reporter: Reporter) -> bool:
        """Bring the files to disk; false when the version that was found is gone."""
        on_bytes = reporter.transfer(f"Fetching {self.uri}", self.info.size)
        for info, (file, _) in zip(self.infos, self.locals(target), strict=True):
            try:
                self.folder.download(info.path, file, on_bytes)
            except FileNotFoundError:
                return False
            if self.folder.stat(info.path) != info:
                return False
        return True


@dataclass(frozen=True)
class DataFiles:
    """The dataset, and the file with held-out rows if the spec names one."""

    rows: DataFile
    held_out: DataFile | None


def find_data_files(dataset: Dataset, storage: Storage) -> DataFiles:
    """Find the files; raises StageError(DatasetNotFound) and the store's or Hub's reasons."""
    rows = _find(dataset.source, "spec.dataset.source", storage)
    held_out = None
    if dataset.eval_source is not None:
        held_out = _find(dataset.eval_source, "spec.dataset.evalSource", storage)
    return DataFiles(rows, held_out)


def _find(uri: str, field: str, storage: Storage) -> DataFile:
    if uri.startswith(HUB_DATASETS):
        hub, found = find_hub_dataset(uri, field)
        return DataFile(uri, hub, found, several=True)
    parent, name = split(uri)
    folder = open_folder(parent, storage)
    info = folder.stat(name) if name and not uri.endswith("/") else None
    if info is not None:
        return DataFile(uri, folder, [info])
    if is_pattern(uri):
        return DataFile(uri, *find_shards(uri, field, storage), several=True)
    hint = ""
    if name and folder.list(f"{name}/"):
        hint = f" There is a folder of that name: write {uri}/ to read the files in it."
    raise StageError(
        Reason.DATASET_NOT_FOUND,
        f"There is no dataset at {uri}: upload the file there, or correct {field}.{hint}",
    )


class DatasetRows:
    """The usable rows of one file, and the problems of the others."""

    def __init__(self, file: DataFile, local: Path) -> None:
        self.file = file
        self.problems = Problems(shards=file.shards)
        self.has_system = False
        """Whether any row has a system prompt."""
        self._local = local
        self._spool = local.with_name(f"{local.name}.rows")
        self._numbers, self._hashes = array("Q"), array("Q")
        self._source: Source | None = None

    def load(self, dataset: Dataset, seed: int, objective: Objective = "sft") -> None:
        """Read the file; raises StageError for what is wrong with it."""
        self._source = open_shards(self.file.locals(self._local), dataset, self.file.uri, objective)
        with self._spool.open("w", encoding="ascii") as out:
            for record in self._source.records(self.problems):
                self._numbers.append(record.number)
                judged = {"rejected": record.rejected, "label": record.label}
                self._hashes.append(row_hash(record.messages, seed, record.tools, judged))
                self.has_system = self.has_system or record.messages[0]["role"] == "system"
                example = as_example(record.messages, record.tools)
                if record.rejected is not None:
                    example["rejected"] = [record.rejected]
                if record.label is not None:
                    example["label"] = record.label
                out.write(json.dumps(example) + "\n")

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
    def oddities(self) -> Oddities | None:
        """What was passed over in the rows of a table."""
        return self._source.oddities if self._source else None

    @property
    def shards(self) -> tuple[ShardReport, ...] | None:
        """The files with their rows, where they are several."""
        if not self.file.several:
            return None
        counted: Sequence[int | None] = [None] * len(self.file.infos)
        if self._source:
            counted = self._source.rows_of_shards
        return tuple(
            ShardReport(uri=self.file.folder.uri_of(info.path), etag=info.etag, rows=rows)
            for info, rows in zip(self.file.infos, counted, strict=True)
        )

    @property
    def numbers(self) -> npt.NDArray[np.uint64]:
        """Number of each usable row, as the reader counts (`Record.number`)."""
        return np.array(self._numbers, dtype=np.uint64)

    def name_of(self, number: int) -> str:
        """A row as a message names it."""
        shard, row = shard_and_row(number)
        return f"{self.file.shards[shard]}:{row}" if self.file.several else str(row)

    def listed(self, mask: Mask) -> ListedRows:
        """The usable rows of which the mask is true."""
        numbers = self.numbers[mask].tolist()
        if not self.file.several:
            return ListedRows(count=len(numbers), rows=numbers)
        found: dict[str, list[int]] = {}
        for shard, row in map(shard_and_row, numbers):
            found.setdefault(self.file.shards[shard], []).append(row)
        return ListedRows(count=len(numbers), files=found)

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


# --- Which rows are held out, which say the same, which are in both files -------------------------
# A row's hash is 64 bits over its messages and the seed, so a million rows take 8 MB, and rows that
# say the same have the same hash and stay together.

FEWEST_ROWS = 20  # a data set with fewer is trained on as a whole
_ALWAYS = ("role", "content")  # keys that each message has
ENOUGH_HELD_OUT = 20  # answers of 13 tokens are 256, which the quality gate wants at least
MOST_SHARE = 0.1  # that ENOUGH_HELD_OUT may take of a small data set
MOST_HELD_OUT = 1000  # more rows make the measured loss hardly more exact, and take longer


def row_hash(
    messages: Sequence[Message],
    seed: int,
    tools: Sequence[Tool] = (),
    judged: Mapping[str, Any] | None = None,
) -> int:
    """64 bits over what is said, the tools, what else a row has (`judged`) and the seed.

    Roles and contents alone make up the hash of a row that has nothing else.
    """
    said: list[Any] = [
        [m["role"], m["content"]] if len(m) == len(_ALWAYS) else [m["role"], m["content"], m]
        for m in messages
    ]
    if more := {name: value for name, value in (judged or {}).items() if value is not None}:
        said.append(more)
    text = json.dumps([*said, tools] if tools else said, ensure_ascii=False)
    key = seed.to_bytes(8, "big")
    # A lone surrogate can't be encoded strictly, and is a row like any other here.
    hashed = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8, key=key)
    return int.from_bytes(hashed.digest(), "big")


def share(rows: int, fraction: float) -> int:
    """How many of `rows` are to be held out.

    A small data set gives up to twice the fraction, until there are ENOUGH_HELD_OUT.
    """
    if fraction == 0 or rows < FEWEST_ROWS:
        return 0
    least = min(ENOUGH_HELD_OUT, round(rows * min(2 * fraction, MOST_SHARE)))
    return min(max(1, round(rows * fraction), least), MOST_HELD_OUT)


def hold_out(hashes: Hashes, fraction: float) -> Mask:
    """Choose the rows that are held out: those with the smallest hashes.

    What is guaranteed: the choice depends on the rows' contents and the seed (which is in the
    hashes), not on their order; rows that say the same are all held out or all trained on; and in
    a file that has grown, the held-out ones of the old rows are still the first so many of the
    same order, so that none changes places with another. Rows that are there so often that they
    don't fit into the number asked for are passed over; where no others are, the ones that are
    there least often are taken. Something is always left to train on.
    """
    held = np.zeros(len(hashes), dtype=np.bool_)
    wanted = share(len(hashes), fraction)
    distinct, counts = np.unique(hashes, return_counts=True)  # ascending
    if not wanted or len(distinct) < 2:
        return held
    chosen = []
    for value, count in zip(distinct.tolist(), counts.tolist(), strict=True):
        if count <= wanted:
            chosen.append(value)
            wanted -= count
        if not wanted:
            break
    if not chosen:
        chosen = [int(distinct[np.argmin(counts)])]
    return np.isin(hashes, np.array(chosen, dtype=np.uint64))


def repeated(hashes: Hashes) -> Mask:
    """Rows that say the same as an earlier one."""
    again = np.ones(len(hashes), dtype=np.bool_)
    again[np.unique(hashes, return_index=True)[1]] = False
    return again


def shared(hashes: Hashes, others: Hashes) -> Mask:
    """Rows of `hashes` that are in the other file as well."""
    return np.isin(hashes, others)
