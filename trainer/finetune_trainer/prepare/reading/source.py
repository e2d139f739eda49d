"""A dataset file: finding out what it is, and its records."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from finetune_trainer.contract import (
    DataFormat,
    Dataset,
    DatasetSummary,
    DetectedFile,
    Reason,
    StageError,
    Tool,
    allowed,
)
from finetune_trainer.prepare.reading.content import GZIP, PARQUET, Content, foreign, unreadable
from finetune_trainer.prepare.reading.conversation import Conversation, InvalidError
from finetune_trainer.prepare.reading.encoding import Text, read_as_text
from finetune_trainer.prepare.reading.json_records import JsonArray, JsonLines
from finetune_trainer.prepare.reading.layout import (
    Layout,
    builder,
    check_columns,
    check_unique,
    default_layout,
    find_layout,
    fit,
    missing_column,
    with_tools,
)
from finetune_trainer.prepare.reading.parquet import Parquet
from finetune_trainer.prepare.reading.record import (
    UNUSED_SHOWN,
    DamageError,
    Problems,
    Reader,
    Record,
    printable,
)
from finetune_trainer.prepare.reading.table import Table

_JSON_BEGINS = re.compile(r'\{\s*"|\[\s*[\[{]')
"""How JSON begins, where a CSV file is expected."""


class Source:
    """An opened dataset; after the last record, what was counted on the way."""

    def __init__(
        self, reader: Reader, layout: Layout, dataset: Dataset, uri: str, compression: str | None
    ) -> None:
        self._reader = reader
        self._layout = layout
        self._dataset = dataset
        self._uri = uri
        self.rows = 0
        """Rows read so far, blank lines not counted."""

        self._ignored: set[str] = set()
        used = set(layout.columns.values())
        self._detected = DetectedFile(
            format=reader.format,
            layout=layout.kind,
            columns=layout.columns,
            unused_columns=tuple(printable(name) for name in reader.fields if name not in used)[
                :UNUSED_SHOWN
            ],
            compression=compression,
            **reader.described,
        )

    @property
    def detected(self) -> DetectedFile:
        """What the file was found to be, as far as it has been read."""
        keys = tuple(printable(key) for key in sorted(self._ignored)[:UNUSED_SHOWN])
        return self._detected.model_copy(update={"unused_message_keys": keys or None})

    def summary(self, problems: Problems) -> DatasetSummary:
        """What has been counted so far."""
        return DatasetSummary(
            rows=self.rows,
            invalid=problems.count,
            first_invalid=tuple(problems.first),
        )

    def records(self, problems: Problems) -> Iterator[Record]:
        """The usable rows in the order of the file; the others go to `problems`.

        With onInvalidRow `fail` no record follows a problem, but reading goes on to the end.
        Raises StageError, in part after the last record: DatasetEmpty; InvalidRows, with the
        summary; DatasetUnreadable for damaged Parquet.
        """
        self.rows = 0
        skip = self._dataset.on_invalid_row == "skip"
        try:
            for number, line, built in self._built():
                self.rows += 1
                if isinstance(built, str):
                    problems.add(number, built + self._place(number, line))
                    continue
                if skip or not problems.count:
                    messages, tools = built
                    yield Record(number, messages, tuple(tools))
        except DamageError as damage:
            self.rows += 1
            cause = damage.cause + self._place(damage.row, damage.line)
            raise self._damaged(damage.row, cause, problems) from damage
        self.check(problems)

    def _built(self) -> Iterator[tuple[int, int, tuple[Conversation, list[Tool]] | str]]:
        build = builder(self._layout, self._dataset.system_prompt, self._ignored)
        for number, line, values in self._reader.rows(list(self._layout.columns.values())):
            if isinstance(values, str):
                yield number, line, values
                continue
            try:
                yield number, line, build(values)
            except InvalidError as error:
                yield number, line, str(error)

    def _place(self, number: int, line: int) -> str:
        return "" if line == number else f" (line {line} of the file)"

    def check(self, problems: Problems) -> None:
        """Raise StageError when no row was read, or more are bad than may be."""
        unit = self._reader.unit
        if not self.rows:
            raise StageError(Reason.DATASET_EMPTY, f"{self._uri} {self._reader.empty}.")
        if not problems.count:
            return
        found = f"{self._uri} has {problems.describe(unit)}."
        header = "The header is row 1. " if isinstance(self._reader, Table) else ""
        limit = self._dataset.max_invalid_rows
        if self._dataset.on_invalid_row == "fail":
            remedy = "Correct or remove them, or set spec.dataset.onInvalidRow: skip."
        elif problems.count > allowed(limit, self.rows):
            remedy = (
                f"That is more than spec.dataset.maxInvalidRows allows ({limit} of "
                f"{self.rows:,} {unit}s): correct or remove them, or raise the limit."
            )
        elif problems.count == self.rows:
            remedy = f"No {unit} is left: correct them."
        else:
            return
        text = f"{found} {header}{remedy}"
        raise StageError(Reason.INVALID_ROWS, text, dataset=self.summary(problems))

    def _damaged(self, row: int, cause: str, problems: Problems) -> StageError:
        problems.add(row, cause)
        unit = self._reader.unit
        text = (
            f"{self._uri} has {problems.describe(unit)}. From {unit} {row} on it can't be told "
            f"where {unit}s begin, so none can be skipped: correct it."
        )
        if problems.count > len(problems.first):
            text += f" There: {cause}."
        return StageError(Reason.INVALID_ROWS, text, dataset=self.summary(problems))


def read_records(file: Path, dataset: Dataset, uri: str, problems: Problems) -> Iterator[Record]:
    """Open the file and read its records, as Source.records does."""
    return open_source(file, dataset, uri).records(problems)


def open_source(file: Path, dataset: Dataset, uri: str) -> Source:
    """Find out what the file is. Its text is read through once, so what can't be read shows here.

    Raises StageError: DatasetEmpty, DatasetUnreadable, ColumnNotFound, InvalidConfig, InvalidRows.
    """
    check_columns(dataset.columns)
    content = Content(file, uri)
    reader = _reader(content, dataset)
    layout = find_layout(reader.fields, dataset.columns)
    if layout is None and not reader.fields and isinstance(reader, JsonLines | JsonArray):
        layout = default_layout(dataset.columns)
    what = "column" if isinstance(reader, Table | Parquet) else "key"
    if layout is None:
        raise missing_column(reader.fields, dataset.columns, uri, what=what)
    layout = with_tools(layout, reader.fields, dataset.columns, uri, what=what)
    check_unique(reader.fields, layout, uri)
    if isinstance(reader, Parquet):
        reader.check_types(layout.columns)
    return Source(reader, layout, dataset, uri, content.compression)


def _reader(content: Content, dataset: Dataset) -> Reader:
    start = content.start
    if start.startswith(PARQUET):
        _check_format(dataset.format, "Parquet", DataFormat.PARQUET, content.uri)
        return Parquet(content)
    if content.compression and start.startswith(GZIP):
        raise unreadable(content.uri, "is gzipped twice: compress it once.")
    if error := foreign(start, content.uri):
        raise error
    text = read_as_text(content)
    if text.blank:
        raise StageError(
            Reason.DATASET_EMPTY,
            f"{content.uri} is empty: write a header row and examples into it.",
        )
    return _text_reader(content, text, dataset)


def _text_reader(content: Content, text: Text, dataset: Dataset) -> Reader:
    begin = content.start[text.mark :].decode(text.encoding, "ignore").lstrip()
    if dataset.format is DataFormat.CSV and not _JSON_BEGINS.match(begin):
        return _table(content, text, dataset)
    if begin.startswith("{"):
        _check_format(dataset.format, "JSON lines", DataFormat.JSONL, content.uri)
        return JsonLines(content, text)
    if begin.startswith("["):
        _check_format(dataset.format, "a JSON array", DataFormat.JSONL, content.uri)
        return JsonArray(content, text)
    _check_format(dataset.format, "CSV", DataFormat.CSV, content.uri)
    return _table(content, text, dataset)


def _table(content: Content, text: Text, dataset: Dataset) -> Table:
    return Table(content, text, lambda header: fit(header, dataset.columns))


def _check_format(given: DataFormat, found: str, fits: DataFormat, uri: str) -> None:
    if given not in (DataFormat.AUTO, fits):
        raise unreadable(
            uri,
            f"is {found} by its content, but spec.dataset.format is {given.value}: "
            f"set it to {fits.value} or leave it out.",
        )
