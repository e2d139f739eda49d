"""A dataset as its files are: what each of them is, and its records."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from finetune_trainer.contract import (
    DataFormat,
    Dataset,
    DatasetSummary,
    DetectedFile,
    Objective,
    Reason,
    StageError,
    allowed,
)
from finetune_trainer.prepare.reading.content import (
    PARQUET,
    Content,
    Parquet,
    foreign,
    unreadable,
)
from finetune_trainer.prepare.reading.contents import builder
from finetune_trainer.prepare.reading.conversation import InvalidError
from finetune_trainer.prepare.reading.encoding import Text, beginning, check_encoding, find_encoding
from finetune_trainer.prepare.reading.json_records import JsonArray, JsonLines, JsonRecords
from finetune_trainer.prepare.reading.layout import (
    OPTIONAL,
    Layout,
    Wanted,
    check_columns,
    check_objective,
    check_text,
    check_unique,
    default_layout,
    find_json_layout,
    find_layout,
    fit,
    missing_column,
    plain,
    wanted_for,
    with_tools,
)
from finetune_trainer.prepare.reading.record import (
    UNUSED_SHOWN,
    DamageError,
    Oddities,
    Problems,
    Reader,
    Record,
    RowContents,
    names,
    place_of,
    printable,
)
from finetune_trainer.prepare.reading.table import Table

_JSON_BEGINS = re.compile(r'\{\s*"|\[\s*[\[{]')
"""How JSON begins, where a CSV file is expected."""


Built = RowContents | str
"""What a row says, or why it says nothing."""


@dataclass(frozen=True)
class OpenedFile:
    """A file of which reader and layout are known."""

    index: int
    """Its place among the files, empty ones included."""

    reader: Reader
    layout: Layout
    uri: str
    compression: str | None
    ignored: set[str] = field(default_factory=set)
    """Keys of messages that nothing was taken from, as far as it has been read."""

    @property
    def detected(self) -> DetectedFile:
        """What it was found to be, as far as it has been read."""
        used = set(self.layout.columns.values())
        unused = [printable(name) for name in self.reader.fields if name not in used]
        return DetectedFile(
            format=self.reader.format,
            layout=self.layout.kind,
            columns=self.layout.columns,
            loosely_matched=self.layout.loosely_matched,
            unused_columns=tuple(unused[:UNUSED_SHOWN]),
            unused_message_keys=tuple(map(printable, sorted(self.ignored)[:UNUSED_SHOWN])) or None,
            compression=self.compression,
            **self.reader.described,
        )

    def built(self, system_prompt: str | None) -> Iterator[tuple[int, int, Built]]:
        """Number and line of each row, and its conversation or why it has none."""
        build = builder(self.layout, system_prompt, self.ignored)
        wanted = list(self.layout.columns.values())
        for number, line, values in self.reader.rows(wanted, self.layout.optional):
            if isinstance(values, str):
                yield number, line, values
                continue
            try:
                yield number, line, build(values)
            except InvalidError as error:
                yield number, line, str(error)


class Source:
    """An opened dataset; after the last record, what was counted on the way."""

    def __init__(
        self, shards: Sequence[OpenedFile], count: int, dataset: Dataset, uri: str
    ) -> None:
        self._shards = shards
        self._dataset = dataset
        self._uri = uri
        self.rows_of_shards = [0] * count
        """Rows read so far of each file, blank lines not counted."""

    @property
    def detected(self) -> DetectedFile:
        """What the first file was found to be, with what was ignored in any."""
        every = set().union(*(shard.ignored for shard in self._shards))
        return replace(self._shards[0], ignored=every).detected

    @property
    def rows(self) -> int:
        """Rows read so far of all files."""
        return sum(self.rows_of_shards)

    @property
    def oddities(self) -> Oddities | None:
        """What was passed over in the rows of a table; None for other formats."""
        if self.detected.format != Table.format:
            return None
        every = [shard.reader.oddities for shard in self._shards]
        return Oddities(
            blank=sum(each.blank for each in every),
            short=sum(each.short for each in every),
            long=sum(each.long for each in every),
        )

    def summary(self, problems: Problems) -> DatasetSummary:
        """What has been counted so far."""
        return DatasetSummary(
            rows=self.rows,
            invalid=problems.count,
            first_invalid=tuple(problems.first),
        )

    def records(self, problems: Problems) -> Iterator[Record]:
        """The usable rows in the order of the files; the others go to `problems`.

        With onInvalidRow `fail` no record follows a problem, but reading goes on to the end.
        Raises StageError, in part after the last record: DatasetEmpty; InvalidRows, with the
        summary; DatasetUnreadable for text that can't be decoded and damaged archives.
        """
        self.rows_of_shards = [0] * len(self.rows_of_shards)
        for shard in self._shards:
            yield from self._records_of(shard, problems)
        self.check(problems)

    def _records_of(self, shard: OpenedFile, problems: Problems) -> Iterator[Record]:
        skip = self._dataset.on_invalid_row == "skip"
        counted, index, first = self.rows_of_shards, shard.index, place_of(shard.index, 0)
        try:
            for number, line, built in shard.built(self._dataset.system_prompt):
                counted[index] += 1
                if isinstance(built, str):
                    problems.add(first + number, built + _line(number, line))
                elif skip or not problems.count:
                    yield Record(
                        first + number,
                        built.messages,
                        tuple(built.tools),
                        built.rejected,
                        built.label,
                    )
        except DamageError as damage:
            counted[index] += 1
            cause = damage.cause + _line(damage.row, damage.line)
            raise self._damaged(shard, damage.row, cause, problems) from damage

    def check(self, problems: Problems) -> None:
        """Raise StageError when no row was read, or more are bad than may be."""
        reader = self._shards[0].reader
        unit = reader.unit
        if not self.rows:
            raise StageError(Reason.DATASET_EMPTY, f"{self._uri} {reader.empty}.")
        if not problems.count:
            return
        found = f"{self._uri} has {problems.describe(unit)}."
        header = "The header is row 1. " if isinstance(reader, Table) else ""
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

    def _damaged(self, shard: OpenedFile, row: int, cause: str, problems: Problems) -> StageError:
        problems.add(place_of(shard.index, row), cause)
        unit = shard.reader.unit
        where = f" of {shard.uri}" if len(self.rows_of_shards) > 1 else ""
        text = (
            f"{self._uri} has {problems.describe(unit)}. From {unit} {row}{where} on it can't be "
            f"told where {unit}s begin, so none can be skipped: correct it."
        )
        if problems.count > len(problems.first):
            text += f" There: {cause}."
        return StageError(Reason.INVALID_ROWS, text, dataset=self.summary(problems))


def _line(number: int, line: int) -> str:
    return "" if line == number else f" (line {line} of the file)"


def open_shards(
    files: Sequence[tuple[Path, str]], dataset: Dataset, uri: str, objective: Objective = "sft"
) -> Source:
    """Find out what the files of a dataset are, each with its URI.

    Raises StageError: DatasetEmpty, DatasetUnreadable, ColumnNotFound, InvalidConfig, InvalidRows.
    """
    check_columns(dataset.columns)
    check_encoding(dataset.encoding)
    wanted = wanted_for(objective, dataset.columns)
    opened = [_open(index, *file, dataset, wanted) for index, file in enumerate(files)]
    shards = [shard for shard in opened if shard]
    if not shards:
        raise StageError(
            Reason.DATASET_EMPTY, f"{uri} is empty: write a header row and examples into it."
        )
    for shard in shards[1:]:
        _check_same(shards[0], shard)
    return Source(shards, len(files), dataset, uri)


def _open(index: int, file: Path, uri: str, dataset: Dataset, wanted: Wanted) -> OpenedFile | None:
    """The file with its reader and layout; None where there is nothing in it."""
    content = Content(file, uri)
    reader = _reader(content, dataset, wanted)
    if reader is None:
        return None
    if isinstance(reader, JsonRecords):
        layout = find_json_layout(reader.shapes, wanted, uri)
        if layout is None and not reader.fields:
            layout = default_layout(wanted)
    else:
        layout = find_layout(reader.fields, wanted)
    what = "column" if isinstance(reader, Table | Parquet) else "key"
    if layout is None:
        raise missing_column(reader.fields, wanted, uri, what=what)
    check_objective(layout, reader.fields, wanted, uri)
    check_text(layout, reader.fields, dataset, uri)
    layout = with_tools(layout, reader.fields, dataset.columns, uri, what=what)
    check_unique(reader.fields, layout, uri)
    if isinstance(reader, Parquet):
        reader.check_types(layout.columns)
    return OpenedFile(index, reader, layout, uri, content.compression)


def _check_same(first: OpenedFile, other: OpenedFile) -> None:
    """Raise StageError(DatasetUnreadable) when two files are no parts of one table."""
    if first.reader.format != other.reader.format:
        here, there = other.reader.format, first.reader.format
    else:
        here, there = _described(other), _described(first)
    if here == there:
        return
    raise unreadable(
        other.uri,
        f"has {here} where {first.uri} has {there}: files that are read as one dataset must have "
        "the same format and the same columns. Name those that belong together by a pattern, or "
        "convert them.",
    )


def _described(shard: OpenedFile) -> str:
    """The columns that are used, as a message names them and as two files are compared by."""
    # What may be blank may also be missing in all of the objects that were looked at.
    lacking = OPTIONAL if isinstance(shard.reader, JsonRecords) else ()
    asked = shard.layout.asked
    return f"the columns {names(plain(asked[part]) for part in asked if part not in lacking)}"


def _reader(content: Content, dataset: Dataset, wanted: Wanted) -> Reader | None:
    start = content.start
    if start.startswith(PARQUET):
        _check_format(dataset.format, "Parquet", DataFormat.PARQUET, content.uri)
        return Parquet(content)
    if error := foreign(start, content.uri):
        raise error
    text = find_encoding(content, dataset.encoding)
    begin = beginning(content, text)
    return _text_reader(content, text, begin, dataset, wanted) if begin else None


def _text_reader(
    content: Content, text: Text, begin: str, dataset: Dataset, wanted: Wanted
) -> Reader:
    if dataset.format is DataFormat.CSV and not _JSON_BEGINS.match(begin):
        return _table(content, text, dataset, wanted)
    if begin.startswith("{"):
        _check_format(dataset.format, "JSON lines", DataFormat.JSONL, content.uri)
        return JsonLines(content, text)
    if begin.startswith("["):
        _check_format(dataset.format, "a JSON array", DataFormat.JSONL, content.uri)
        return JsonArray(content, text)
    _check_format(dataset.format, "CSV", DataFormat.CSV, content.uri)
    return _table(content, text, dataset, wanted)


def _table(content: Content, text: Text, dataset: Dataset, wanted: Wanted) -> Table:
    return Table(content, text, dataset.csv, lambda header: fit(header, wanted))


def _check_format(given: DataFormat, found: str, fits: DataFormat, uri: str) -> None:
    if given not in (DataFormat.AUTO, fits):
        raise unreadable(
            uri,
            f"is {found} by its content, but spec.dataset.format is {given.value}: "
            f"set it to {fits.value} or leave it out.",
        )
