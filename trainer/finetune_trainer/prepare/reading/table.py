"""A CSV file, row by row."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from finetune_trainer.outcome import Reason, StageError
from finetune_trainer.prepare.reading.content import Content
from finetune_trainer.prepare.reading.dialect import MAX_CELL, Dialect, Fit, Rows, find_dialect
from finetune_trainer.prepare.reading.encoding import Text
from finetune_trainer.prepare.reading.lines import LongLineError, open_lines
from finetune_trainer.prepare.reading.record import DamageError, Row
from finetune_trainer.prepare.reading.wording import names, plural

MAX_COLUMNS = 10_000

_BLANK = "all cells are blank"


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
    def _open(self) -> Iterator[Rows]:
        with open_lines(self.content, self.text) as lines:
            if self.dialect.sep_line:
                next(lines, None)
            yield self.dialect.rows(lines)


def _header(rows: Rows) -> tuple[int, list[str]]:
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
