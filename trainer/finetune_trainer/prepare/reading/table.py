"""A CSV file: its rows, and the search for how it separates and quotes its cells."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.prepare.reading.content import Content
from finetune_trainer.prepare.reading.encoding import MAX_LINE, LongLineError, Text, open_lines
from finetune_trainer.prepare.reading.record import DamageError, Row, names, plural

MAX_CELL = MAX_LINE // 2  # characters; a longer cell is a quote that was never closed
MAX_COLUMNS = 10_000
DELIMITERS = ",;\t|"

_SAMPLE_LINES, _SAMPLE_CHARS = 400, 1 << 20  # tell delimiters apart where the header does not
_SEP = re.compile(r'"?sep=([^\w\s"\'\\]|\t)"?\r?\n?', re.IGNORECASE)
_BLANK = "all cells are blank"
_ESCAPE = re.compile(r"\\([\\\"',;\t|\r\n]?)")

Fit = Callable[[list[str]], int]
"""How well a header suits what is wanted; more is better."""


class CsvReader(Protocol):
    """What csv.reader returns."""

    line_num: int

    def __iter__(self) -> Iterator[list[str]]: ...

    def __next__(self) -> list[str]: ...


@dataclass(frozen=True)
class Dialect:
    """One way to read a CSV file."""

    delimiter: str = ","
    quote: str = '"'
    """The quote character; empty where quotes have no meaning."""

    backslash: bool = False
    """Whether a quote inside quotes follows a backslash; else it is written twice."""

    spaced: bool = False
    """Whether a space may stand between a delimiter and a quote."""

    sep_line: bool = False
    """Whether the first line is Excel's `sep=;`."""

    def rows(self, lines: Iterable[str], *, strict: bool = True) -> CsvReader:
        """The rows of these lines; iterating raises csv.Error."""
        csv.field_size_limit(MAX_CELL)
        return csv.reader(
            _escaped(lines) if self.backslash else lines,
            delimiter=self.delimiter,
            quotechar=self.quote or None,
            quoting=csv.QUOTE_MINIMAL if self.quote else csv.QUOTE_NONE,
            doublequote=not self.backslash,
            escapechar="\\" if self.backslash else None,
            skipinitialspace=self.spaced,
            strict=strict,
        )


def _escaped(lines: Iterable[str]) -> Iterator[str]:
    """Keep backslashes that escape nothing; csv alone would drop them, as in C:\\new."""
    for line in lines:
        yield _ESCAPE.sub(_keep, line) if "\\" in line else line


def _keep(found: re.Match[str]) -> str:
    return found[0] if found[1] else "\\\\"


class Table:
    """A CSV file whose dialect and header are known."""

    unit = "row"
    format = "csv"

    def __init__(self, content: Content, text: Text, fit: Fit) -> None:
        self.content = content
        self.text = text
        self.dialect = find_dialect(content, text, fit)
        with self._open() as rows:
            try:
                _, self.fields = _header(rows)
            except (csv.Error, LongLineError) as error:
                cause = f"its header can't be read: {_cause(error)}"
                raise StageError(Reason.DATASET_UNREADABLE, f"{content.uri}: {cause}.") from error
        if len(self.fields) > MAX_COLUMNS:
            raise StageError(
                Reason.DATASET_UNREADABLE,
                f"{content.uri} has {len(self.fields):,} columns: it is no table of examples.",
            )

    @property
    def described(self) -> dict[str, str | None]:
        """What is special about the format, for Detected."""
        escape = "backslash" if self.dialect.backslash else "doubled"
        return {
            "encoding": self.text.encoding,
            "delimiter": self.dialect.delimiter,
            "quote": self.dialect.quote,
            "escape": escape if self.dialect.quote else None,
        }

    @property
    def empty(self) -> str:
        """What to say when there are no rows."""
        return f"has a header ({names(self.fields)}) and no rows: add examples below it"

    def rows(self, wanted: Sequence[str]) -> Iterator[Row]:
        """The rows below the header, without blank lines; raises DamageError."""
        picked = [self.fields.index(name) for name in wanted]
        width = len(self.fields)
        with self._open() as rows:
            number, _ = _header(rows)
            while True:
                number += 1
                line = rows.line_num + 1
                try:
                    cells = next(rows, None)
                except (csv.Error, LongLineError) as error:
                    raise DamageError(number, self._line(line), _cause(error)) from error
                if cells is None:
                    return
                if len(cells) == width:
                    yield number, self._line(line), _values(cells, picked) or _BLANK
                elif len(cells) > 1 or (cells and cells[0].strip()):
                    yield number, self._line(line), _ragged(cells, width, self.dialect)

    def _line(self, line: int) -> int:
        return line + self.dialect.sep_line

    @contextmanager
    def _open(self) -> Iterator[CsvReader]:
        with open_lines(self.content, self.text) as lines:
            if self.dialect.sep_line:
                next(lines, None)
            yield self.dialect.rows(lines)


def _header(rows: CsvReader) -> tuple[int, list[str]]:
    """The first row that is no blank line, and its number."""
    number = 0
    for number, cells in enumerate(rows, start=1):
        if cells:
            return number, cells
    return number, []


def _values(cells: list[str], picked: list[int]) -> list[str] | None:
    values = [cells[index] for index in picked]
    return values if any(values) or any(cell.strip() for cell in cells) else None


def _ragged(cells: list[str], width: int, dialect: Dialect) -> str:
    names_of = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
    mark = names_of.get(dialect.delimiter, repr(dialect.delimiter))
    return (
        f"{plural(len(cells), 'cell')} where the header has {width} "
        f"(a {mark} inside a text needs quotes around the text)"
    )


def _cause(error: Exception) -> str:
    text = str(error)
    if "unexpected end of data" in text:
        return "a quote is opened and never closed"
    if isinstance(error, LongLineError) or "field larger" in text:
        return f"a cell has over {MAX_CELL:,} characters (is a quote never closed?)"
    if "expected after" in text:
        return f"{text} (a quote inside a quoted text is written twice)"
    return text


def find_dialect(content: Content, text: Text, fit: Fit) -> Dialect:
    """The way to read the file, by its header and, where in doubt, all of its rows."""
    with open_lines(content, text) as lines:
        start = _start(lines)
    named = _SEP.fullmatch(start[0]) if start else None
    first = Dialect(named[1], sep_line=True) if named else _by_header(start, text, fit)
    others = _alternatives(first, text)
    if not others:
        return first
    best, least = first, _damage(content, text, first, fit)
    if least[1:] != (0, 0):
        for other in others:
            damage = _damage(content, text, other, fit)
            if damage < least:
                best, least = other, damage
    return best


def _start(lines: Iterator[str]) -> list[str]:
    start: list[str] = []
    size = 0
    try:
        for line in islice(lines, _SAMPLE_LINES):
            start.append(line)
            size += len(line)
            if size > _SAMPLE_CHARS:
                break
    except LongLineError:
        pass  # it is reported where rows are read
    return start


def _by_header(start: list[str], text: Text, fit: Fit) -> Dialect:
    candidates = [
        Dialect(delimiter, quote, spaced=spaced)
        for spaced in ([False, True] if text.spaced else [False])
        for quote in (['"', "'"] if text.single else ['"'])
        for delimiter in DELIMITERS
    ]
    return max(candidates, key=lambda candidate: _suitability(start, candidate, fit))


def _suitability(start: list[str], dialect: Dialect, fit: Fit) -> tuple[float, ...]:
    """How well the header fits, then how usual the quoting is, then the share of rows that are as
    wide as the header."""
    usual = dialect.quote == '"', not dialect.spaced
    rows: list[list[str]] = []
    with suppress(csv.Error):  # a broken cell further down says nothing about the rows before
        rows.extend(row for row in dialect.rows(start, strict=False) if row)
    if not rows:
        return 0, *usual, 0.0, 0.0
    width = len(rows[0])
    even = sum(len(row) == width for row in rows) / len(rows)
    return fit(rows[0]), *usual, even if width > 1 else 0.0, even


def _alternatives(first: Dialect, text: Text) -> list[Dialect]:
    """Other ways of quoting that the characters of the file allow."""
    found: list[Dialect] = []
    if text.backslash:
        found.append(replace(first, backslash=True))
    if text.single and first.quote == '"':
        found += [replace(way, quote="'") for way in (first, *found)]
    if first.delimiter == "\t":  # the registered form of text/tab-separated-values has no quotes
        found.append(replace(first, quote=""))
    return found


def _damage(content: Content, text: Text, dialect: Dialect, fit: Fit) -> tuple[int, int, int]:
    """How badly all of the file fits: unfit header, broken quotes (0 or 1), ragged rows."""
    ragged, unfit, width = 0, 0, 0
    try:
        with open_lines(content, text) as lines:
            if dialect.sep_line:
                next(lines, None)
            for row in dialect.rows(lines):
                if not width and row:
                    width, unfit = len(row), -fit(row)
                elif row and len(row) != width:
                    ragged += 1
    except (csv.Error, LongLineError):
        return unfit, 1, ragged
    return unfit, 0, ragged
