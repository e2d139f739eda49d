"""How a CSV file separates and quotes its cells.

The header decides on the delimiter: it is the one that makes the wanted columns appear. That is
surer than what csv.Sniffer or clevercsv can do, which don't know a single word of the file and
are led astray by prose full of commas. How quotes are escaped is decided by the whole file: where
there is anything to doubt, it is parsed once with each way of quoting, and the one with the fewest
ragged rows is taken, RFC 4180 being preferred.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

from finetune_trainer.prepare.reading.content import Content
from finetune_trainer.prepare.reading.encoding import Text
from finetune_trainer.prepare.reading.lines import MAX_LINE, LongLineError, open_lines

MAX_CELL = MAX_LINE // 2  # characters; a longer cell is a quote that was never closed
DELIMITERS = ",;\t|"

_SAMPLE_LINES, _SAMPLE_CHARS = 400, 1 << 20  # tell delimiters apart where the header does not
_SEP = re.compile(r'"?sep=([^\w\s"\'\\]|\t)"?\r?\n?', re.IGNORECASE)
_ESCAPE = re.compile(r"\\([\\\"',;\t|\r\n]?)")

Fit = Callable[[list[str]], int]
"""How well a header suits what is wanted; more is better."""


class Rows(Protocol):
    """What csv.reader returns."""

    line_num: int

    def __iter__(self) -> Iterator[list[str]]:  # noqa: D105
        ...

    def __next__(self) -> list[str]:  # noqa: D105
        ...


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

    def rows(self, lines: Iterable[str], *, strict: bool = True) -> Rows:
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
    """Backslashes that escape nothing stay: csv alone would drop them, as in C:\\new."""
    for line in lines:
        yield _ESCAPE.sub(_keep, line) if "\\" in line else line


def _keep(found: re.Match[str]) -> str:
    return found[0] if found[1] else "\\\\"


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
