"""The CSV file, read as text and checked row by row.

Every cell is text: `NA`, `null` and `0012` stay what they are. Rows are numbered as a spreadsheet
numbers them, the header being row 1.
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from finetune_trainer.config import Columns
from finetune_trainer.outcome import Reason, StageError

MAX_CELL = 16 << 20  # characters; a longer cell is a quote that was never closed
SHOWN = 10  # problems and column names that a message lists

_BINARY = {
    b"PK\x03\x04": "a spreadsheet or zip archive",
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "a gzip archive",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"%PDF": "a PDF document",
}


@dataclass(frozen=True)
class Row:
    """One example of the file."""

    number: int
    instruction: str
    response: str


@dataclass
class _Problems:
    """What is wrong with rows: the first few, and how many there are."""

    found: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, row: int, text: str) -> None:
        self.count += 1
        if len(self.found) < SHOWN:
            self.found.append(f"row {row}: {text}")


def read_csv(file: Path, columns: Columns, uri: str) -> list[Row]:
    """Read all examples.

    Raises StageError: DatasetEmpty, DatasetUnreadable (no UTF-8 text), ColumnNotFound, InvalidRows
    (blank cells, missing or surplus cells, broken quotes; all problems at once).
    """
    _check_text(file, uri)
    csv.field_size_limit(MAX_CELL)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        problems = _Problems()
        header, rows = _read(reader, columns, uri, problems)
    if problems.count:
        more = problems.count - len(problems.found)
        raise StageError(
            Reason.INVALID_ROWS,
            f"{uri} has {_plural(problems.count, 'bad row')}. {'; '.join(problems.found)}"
            f"{f'; and {more} more' if more else ''}. The header is row 1; correct or remove them.",
        )
    if not rows:
        raise StageError(
            Reason.DATASET_EMPTY,
            f"{uri} has a header ({_names(header)}) and no rows: add examples below it.",
        )
    return rows


def _read(
    reader: Iterator[list[str]], columns: Columns, uri: str, problems: _Problems
) -> tuple[list[str], list[Row]]:
    number = 1
    rows: list[Row] = []
    header: list[str] = []
    try:
        header = next(reader, [])
        picked = [_column(header, name, uri) for name in (columns.instruction, columns.response)]
        for number, cells in enumerate(reader, start=2):
            if cells:  # an empty line is no row
                row = _row(number, cells, header, picked, problems)
                rows += [row] if row else []
    except csv.Error as error:
        if not header:
            number = 0
        # The reader stopped within the row after the last good one.
        text = str(error)
        if "unexpected end of data" in text:
            text = "a quote is opened and never closed"
        elif "field larger" in text:
            text = f"a cell has over {MAX_CELL:,} characters: is a quote never closed?"
        problems.add(number + 1, text)
    return header, rows


def _row(
    number: int, cells: list[str], header: list[str], picked: list[int], problems: _Problems
) -> Row | None:
    if len(cells) != len(header):
        problems.add(
            number,
            f"{_plural(len(cells), 'cell')} where the header has {len(header)} "
            "(a comma inside a text needs quotes around the text)",
        )
        return None
    blank = [header[index] for index in picked if not cells[index].strip()]
    if blank:
        problems.add(number, f"{_names(blank)} is blank")
        return None
    instruction, response = (cells[index] for index in picked)
    return Row(number, instruction, response)


def _column(header: list[str], name: str, uri: str) -> int:
    if header.count(name) == 1:
        return header.index(name)
    if name in header:
        raise StageError(
            Reason.COLUMN_NOT_FOUND,
            f"The header of {uri} has the column {name!r} {header.count(name)} times: rename one.",
        )
    lowered = {known.strip().lower(): known for known in reversed(header)}
    close = difflib.get_close_matches(name.strip().lower(), lowered, n=1)
    hint = f" Did you mean {lowered[close[0]]!r}?" if close else ""
    if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
        hint = " The cells seem not to be separated by commas: export it as comma-separated."
    raise StageError(
        Reason.COLUMN_NOT_FOUND,
        f"{uri} has no column {name!r}; it has {_names(header)}.{hint} Map the columns in "
        "spec.dataset.columns, or rename them in the file.",
    )


def _check_text(file: Path, uri: str) -> None:
    """Refuse what is no UTF-8 text, with the position of the first byte that is not."""
    with file.open("rb") as stream:
        start = stream.read(4)
    if not start.strip(b"\xef\xbb\xbf\r\n\t ") and file.stat().st_size <= len(start):
        raise StageError(
            Reason.DATASET_EMPTY, f"{uri} is empty: write a header row and examples into it."
        )
    for magic, what in _BINARY.items():
        if start.startswith(magic):
            raise StageError(
                Reason.DATASET_UNREADABLE,
                f"{uri} is {what}, not CSV: export it as CSV in UTF-8.",
            )
    position = 0
    with file.open("rb") as stream:
        for line in stream:
            bad = line.find(b"\0")
            try:
                line.decode()
            except UnicodeDecodeError as error:
                bad = error.start if bad < 0 else min(bad, error.start)
            if bad >= 0:
                raise StageError(
                    Reason.DATASET_UNREADABLE,
                    f"{uri} is not UTF-8 text: byte {position + bad} (0x{line[bad]:02x}) can't be "
                    "read. Export it as CSV in UTF-8.",
                )
            position += len(line)


def _names(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:SHOWN])
    return f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
