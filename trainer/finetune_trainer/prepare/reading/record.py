"""What the readers of all formats share: rows, records, problems, and how messages name them."""

from __future__ import annotations

import json
import tempfile
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple, Protocol

from finetune_trainer.contract import BadRow, Message, Tool

SHOWN = 10  # problems and column names that a message lists
LONGEST = 200  # characters of a cause
UNUSED_SHOWN = 100  # columns in dataset-report.json
IN_MEMORY = 1 << 20  # bytes of bad rows that are kept in memory; more go to a temporary file


Row = tuple[int, int, Sequence[Any] | str]
"""Number and line of a row, and the values of the wanted columns or the cause why it has none."""

SHARD_SHIFT = 32


def place_of(shard: int, row: int) -> int:
    """One number for a row of a shard, the first being 0: in a single file the row's own."""
    return (shard << SHARD_SHIFT) | row


def shard_and_row(place: int) -> tuple[int, int]:
    """What place_of was made of."""
    return place >> SHARD_SHIFT, place & ((1 << SHARD_SHIFT) - 1)


class Reader(Protocol):
    """One format: its columns, and its rows from the first on, as often as asked for."""

    unit: str
    """What the format counts: row, line or element."""

    format: str
    fields: list[str]
    """The columns, or keys."""

    oddities: Oddities
    """What was passed over by the latest reading of all rows."""

    @property
    def described(self) -> dict[str, str | None]:
        """What is special about the format, for Detected."""

    @property
    def empty(self) -> str:
        """What to say when there are no rows."""

    def rows(self, wanted: Sequence[str], optional: Collection[str] = ()) -> Iterator[Row]:
        """The rows with the values of these columns; raises DamageError or StageError.

        A column that is optional may be missing in a row.
        """


@dataclass
class Oddities:
    """What a spreadsheet leaves behind and a reader passes over, counted in rows."""

    blank: int = 0
    """Nothing in them but white space, and delimiters."""

    short: int = 0
    """Cells missing at the end that are not needed."""

    long: int = 0
    """Empty cells behind the last column."""


class RowContents(NamedTuple):
    """What a row says."""

    messages: tuple[Message, ...]
    """Turns that end with an assistant's; of a pair, with the chosen answer."""

    tools: Sequence[Tool] = ()
    """What the conversation may call."""

    rejected: Message | None = None
    """Of a pair, the other answer."""

    label: bool | None = None
    """Whether the answer is a good one, where the row says so."""


@dataclass(frozen=True, slots=True)
class Record:
    """One usable example."""

    number: int
    """Of the row in a table, blank rows included, the header being 1; of the line in JSON lines,
    of the element in a JSON array, of the row in Parquet, each from 1. With the number of the
    shard in it (`shard_and_row`)."""

    messages: tuple[Message, ...]
    """Turns that end with an assistant's."""

    tools: tuple[Tool, ...] = ()
    rejected: Message | None = None
    label: bool | None = None
    """As in RowContents."""


def _spool() -> IO[str]:
    return tempfile.SpooledTemporaryFile(IN_MEMORY, "w+", encoding="utf-8", newline="\n")


@dataclass
class Problems:
    """Rows that can't be used: how many, the first ten, and all of them on disk."""

    count: int = 0
    first: list[BadRow] = field(default_factory=list)
    shards: Sequence[str] = ()
    """Names of the shards; empty for a dataset of one file."""

    _all: IO[str] = field(default_factory=_spool, repr=False)

    def __post_init__(self) -> None:
        weakref.finalize(self, self._all.close)

    def add(self, place: int, cause: str) -> None:
        """Note a row by its Record.number; a long cause is cut."""
        cause = clip(cause)
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(self._bad_row(place, cause))
        self._all.write(json.dumps([place, cause]) + "\n")

    def __iter__(self) -> Iterator[BadRow]:
        """All of them, in the order of the file; not while rows are being added."""
        self._all.seek(0)
        for line in self._all:
            yield self._bad_row(*json.loads(line))

    def _bad_row(self, place: int, cause: str) -> BadRow:
        shard, row = shard_and_row(place)
        return BadRow(file=self.shards[shard] if self.shards else None, row=row, cause=cause)

    def describe(self, unit: str) -> str:
        """`2 bad rows. row 3: …; row 5: …`."""
        more = self.count - len(self.first)
        listed = "; ".join(
            f"{f'{name_of(bad.file)} ' if bad.file else ''}{unit} {bad.row}: {bad.cause}"
            for bad in self.first
        )
        return f"{plural(self.count, f'bad {unit}')}. {listed}" + (
            f"; and {more:,} more" if more else ""
        )


class DamageError(Exception):
    """From this place on it can't be told where a row begins, so none can be skipped."""

    def __init__(self, row: int, line: int, cause: str) -> None:
        super().__init__(cause)
        self.row = row
        self.line = line
        self.cause = cause


def clip(text: str, limit: int = LONGEST) -> str:
    """The text on one line, cut where it would fill the message alone."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def printable(name: str) -> str:
    """A column's name for a report: short, and without halves of surrogate pairs."""
    return clip(name.encode("utf-8", "backslashreplace").decode())


def name_of(name: str) -> str:
    """A column as the message quotes it."""
    return clip(repr(name), 60)


def names(of: Iterable[str]) -> str:
    """The first columns, and how many more there are."""
    every = list(of)
    shown = ", ".join(name_of(name) for name in every[:SHOWN])
    return f"{shown} and {len(every) - SHOWN} more" if len(every) > SHOWN else shown


def plural(count: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
