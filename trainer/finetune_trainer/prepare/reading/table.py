"""A CSV file: one dialect for all of it, led by its header, and its rows.

No row changes how another is read. A quote opens a cell at its beginning and nowhere else, and is
written twice inside one (RFC 4180). Quotes inside a text without quotes around it are text, but
then no cell may have line breaks: where both are, a quote that is never closed could swallow rows
and make others of them, so such a file is refused.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from finetune_trainer.contract import Csv, Reason, StageError
from finetune_trainer.prepare.reading.content import Content
from finetune_trainer.prepare.reading.encoding import MAX_LINE, LongLineError, Text, open_lines
from finetune_trainer.prepare.reading.record import DamageError, Oddities, Row, names, plural

MAX_CELL = MAX_LINE // 2  # characters; a longer cell is a quote that was never closed
MAX_COLUMNS = 10_000
DELIMITERS = ",;\t|"

# Blank lines may stand above the header, and line breaks in it.
_HEADER_LINES, _HEADER_CHARS = 400, 1 << 20
_SEP = re.compile(r'"?sep=([^\w\s"\'\\]|\t)"?\r?\n?', re.IGNORECASE)
_MARKS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}

Fit = Callable[[list[str]], int]
"""How well a header suits what is wanted; more is better."""


class CsvReader(Protocol):
    line_num: int

    def __iter__(self) -> Iterator[list[str]]: ...

    def __next__(self) -> list[str]: ...


@dataclass(frozen=True)
class Dialect:
    """One way to read a CSV file."""

    delimiter: str
    quote: str = '"'
    """The quote character; empty where quotes have no meaning."""

    escape: str | None = None
    """Takes the meaning of a quote, delimiter, line end or itself behind it."""

    sep_line: bool = False
    """Whether the first line is Excel's `sep=;`."""

    def reader(self, lines: Iterable[str]) -> CsvReader:
        """The rows of these lines; iterating raises csv.Error."""
        csv.field_size_limit(MAX_CELL)
        return csv.reader(
            self._escaped(lines) if self.escape else lines,
            delimiter=self.delimiter,
            quotechar=self.quote or None,
            quoting=csv.QUOTE_MINIMAL if self.quote else csv.QUOTE_NONE,
            escapechar=self.escape,
            strict=True,
        )

    def _escaped(self, lines: Iterable[str]) -> Iterator[str]:
        """Keep what escapes nothing; csv alone would drop the backslash in C:\\new."""
        escape = str(self.escape)
        marks = re.escape(escape + self.quote + self.delimiter)
        lone = re.compile(f"{re.escape(escape)}([{marks}\r\n]?)")
        for line in lines:
            yield lone.sub(lambda it: it[0] if it[1] else escape * 2, line)


class Table:
    """A CSV file whose dialect and header are known."""

    unit = "row"
    format = "csv"

    def __init__(self, content: Content, text: Text, given: Csv, fit: Fit) -> None:
        self.content = content
        self.text = text
        self.oddities = Oddities()
        self.dialect = find_dialect(content, text, given, fit)
        try:
            self.fields = next((cells for _, _, cells in self._records() if _filled(cells)), [])
        except DamageError as error:
            raise StageError(
                Reason.DATASET_UNREADABLE, f"{content.uri}: its header can't be read: {error}."
            ) from error
        if len(self.fields) > MAX_COLUMNS:
            raise StageError(
                Reason.DATASET_UNREADABLE,
                f"{content.uri} has {len(self.fields):,} columns: it is no table of examples.",
            )

    @property
    def described(self) -> dict[str, str | None]:
        """What is special about the format, for Detected."""
        dialect = self.dialect
        return {
            "encoding": self.text.encoding,
            "delimiter": dialect.delimiter,
            "quote": dialect.quote,
            "escape": dialect.escape or ("doubled" if dialect.quote else None),
        }

    @property
    def empty(self) -> str:
        """What to say when there are no rows."""
        return f"has a header ({names(self.fields)}) and no rows: add examples below it"

    def rows(self, wanted: Sequence[str], optional: Collection[str] = ()) -> Iterator[Row]:
        """The rows below the header, without blank ones; raises DamageError."""
        picked = [self.fields.index(name) for name in wanted]
        needed = max(self.fields.index(name) for name in wanted if name not in optional)
        width = len(self.fields)
        oddities = self.oddities = Oddities()
        records = self._records()
        for _, _, header in records:
            if _filled(header):
                break
        for number, line, cells in records:
            if len(cells) == width:
                values = [cells[index] for index in picked]
                if any(map(str.strip, values)) or _filled(cells):
                    yield number, line, values
                else:
                    oddities.blank += 1
            elif not _filled(cells):
                oddities.blank += 1
            elif len(cells) > width and not _filled(cells[width:]):
                oddities.long += 1
                yield number, line, [cells[index] for index in picked]
            elif needed < len(cells) < width:
                oddities.short += 1
                yield number, line, [cells[at] if at < len(cells) else "" for at in picked]
            else:
                yield number, line, self._misfit(cells)

    def _records(self) -> Iterator[tuple[int, int, list[str]]]:
        """Number, line and cells of each row, the header and blank ones included.

        Raises DamageError where it can't be told where the next row begins.
        """
        quotes = _Quotes(self.dialect)
        with open_lines(self.content, self.text) as lines:
            if self.dialect.sep_line:
                next(lines, None)
            rows = self.dialect.reader(quotes.watch(lines))
            number = 0
            while True:
                number += 1
                line = rows.line_num + 1 + self.dialect.sep_line
                try:
                    cells = next(rows, None)
                except (csv.Error, LongLineError) as error:
                    raise DamageError(number, line, self._cause(error)) from error
                if cells is None:
                    return
                if quotes.doubtful(cells):
                    raise DamageError(number, line, _DOUBTFUL)
                yield number, line, cells

    def _misfit(self, cells: list[str]) -> str:
        """Why the row has not the cells that it needs."""
        width = len(self.fields)
        counted = f"{plural(len(cells), 'cell')} where the header has {width}"
        if len(cells) < width:
            return f"{counted}: {names(self.fields[len(cells) :])} missing at the end"
        quote, escape = self.dialect.quote, self.dialect.escape
        if quote and any(cell[:1] == " " and cell.lstrip()[:1] == quote for cell in cells):
            return f"{counted} (a quote opens a text only right behind the delimiter: no space)"
        if quote != "'" and any(cell[:1] == "'" for cell in cells):
            return f"{counted} (if texts stand in single quotes, set spec.dataset.csv.quote)"
        if not escape and any(cell[-1:] == "\\" for cell in cells[:-1]):
            return f"{counted} (if a backslash escapes, set spec.dataset.csv.escape)"
        mark = _MARKS.get(self.dialect.delimiter, repr(self.dialect.delimiter))
        return f"{counted} (a {mark} inside a text needs quotes around the text)"

    def _cause(self, error: Exception) -> str:
        text = str(error)
        if "unexpected end of data" in text:
            return "a quote is opened and never closed"
        if isinstance(error, LongLineError) or "field larger" in text:
            return f"a cell has over {MAX_CELL:,} characters (is a quote never closed?)"
        if "expected after" in text:
            return (
                f"{text} (a quote inside a quoted text is written twice; where quotes mean nothing "
                'or a backslash escapes them, set spec.dataset.csv.quote: "" or .escape)'
            )
        return text


def _filled(cells: Sequence[str]) -> bool:
    """Whether there is anything but white space."""
    return any(map(str.strip, cells))


_DOUBTFUL = (
    "the file has quotes inside texts without quotes around them, and line breaks inside quotes: "
    "write each such quote twice, and quotes around its text"
)


class _Quotes:
    """Watches that what stands between quotes can't be taken for rows, nor rows for that."""

    def __init__(self, dialect: Dialect) -> None:
        self._quote = "" if dialect.escape else dialect.quote
        quote, delimiter = re.escape(dialect.quote or '"'), re.escape(dialect.delimiter)
        self._quoted = re.compile(
            f"(?:^|(?<={delimiter})){quote}(?:[^{quote}]++|{quote}{quote})*+{quote}"
        )
        self._first = ""
        self._more: io.StringIO | None = None
        self._lone = False
        self._breaks = False

    def watch(self, lines: Iterable[str]) -> Iterator[str]:
        """The same lines, which are remembered until the row is whole."""
        for line in lines:
            if not self._first:
                self._first = line
            elif self._more is None:
                self._more = io.StringIO(self._first + line, newline="")
                self._more.seek(0, io.SEEK_END)
            else:
                self._more.write(line)
            yield line

    def doubtful(self, cells: Sequence[str]) -> bool:
        """Whether, with this row, the file has both lone quotes and line breaks in quotes."""
        first, more, quote = self._first, self._more, self._quote
        self._first, self._more = "", None
        if not quote:
            return False
        if more is not None:
            self._breaks = True
        if not self._lone and quote in first:
            for cell in cells:
                if quote in cell:
                    raw = first if more is None else more.getvalue()
                    self._lone = quote in self._quoted.sub("", raw)
                    break
        return self._lone and self._breaks


def find_dialect(content: Content, text: Text, given: Csv, fit: Fit) -> Dialect:
    """The dialect as it is given; the delimiter is else the one that makes the best header."""
    with open_lines(content, text) as lines:
        start = _start(lines)
    named = _SEP.fullmatch(start[0]) if start else None
    if named:
        start = start[1:]
        delimiters = [given.delimiter or named[1]]
    else:
        delimiters = [given.delimiter] if given.delimiter else list(DELIMITERS)

    def dialect(delimiter: str) -> Dialect:
        return Dialect(delimiter, given.quote, given.escape, bool(named))

    def suits(candidate: Dialect) -> tuple[int, int]:
        header = _header(start, candidate)
        return fit(header[: MAX_COLUMNS + 1]), len(header)

    return max(map(dialect, delimiters), key=suits)


def _start(lines: Iterator[str]) -> list[str]:
    start: list[str] = []
    size = 0
    with suppress(LongLineError):  # it is reported where rows are read
        for line in islice(lines, _HEADER_LINES):
            start.append(line)
            size += len(line)
            if size > _HEADER_CHARS:
                break
    return start


def _header(start: list[str], dialect: Dialect) -> list[str]:
    with suppress(csv.Error):
        return next(filter(_filled, dialect.reader(start)), [])
    return []
