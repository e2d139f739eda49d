"""A Parquet file, read in small batches."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from finetune_trainer.contract import StageError
from finetune_trainer.prepare.reading.content import BOMB_RATIO, Content, expands_to, unreadable
from finetune_trainer.prepare.reading.record import Oddities, Row, clip, name_of

BATCH, BATCH_BYTES = 64, 16 << 20  # what is in memory at once, as Python objects
BUFFER = 1 << 20  # bytes read ahead of each column

LISTS = ("messages", "prompt", "completion", "chosen", "rejected", "tools", "functions")
"""Parts that may be lists of objects."""

_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError)


class Parquet:
    """A Parquet file whose schema is known."""

    unit = "row"
    format = "parquet"
    empty = "has columns and no rows: write examples into it"

    def __init__(self, content: Content) -> None:
        self.content = content
        self.oddities = Oddities()
        with self._open() as parquet:
            self.schema: pa.Schema = parquet.schema_arrow
            self.fields = list(self.schema.names)
            self._check_size(parquet.metadata)
            self.batch = _batch(parquet.metadata)

    @property
    def described(self) -> dict[str, str | None]:
        """What is special about the format, for Detected."""
        return {}

    def check_types(self, wanted: dict[str, str]) -> None:
        """Text, whole numbers and truth values, or lists of messages where they may be."""
        for part, name in wanted.items():
            kind = self.schema.field(name).type
            lists = part in LISTS
            whole = pa.types.is_integer(kind) or pa.types.is_boolean(kind)
            if _is_text(kind) or (lists and _is_messages(kind)):
                continue
            if whole and part not in ("messages", "tools", "functions"):
                continue
            due = "text or a list of objects" if lists else "text"
            raise unreadable(
                self.content.uri,
                f"has the column {name_of(name)} of type {clip(str(kind), 80)}, not {due}: "
                "convert it, or map another column in spec.dataset.columns.",
            )

    def rows(self, wanted: Sequence[str], optional: Collection[str] = ()) -> Iterator[Row]:  # noqa: ARG002 - may be null
        """The wanted values of each row; raises StageError (DatasetUnreadable)."""
        number = 0
        with self._open() as parquet:
            for batch in parquet.iter_batches(self.batch, columns=list(wanted), use_threads=False):
                columns = [_values(batch.column(name)) for name in wanted]
                for values in zip(*columns, strict=True):
                    number += 1
                    yield number, number, values

    def _check_size(self, metadata: pq.FileMetaData) -> None:
        """A page is unpacked whole, so what a small file may expand to has an end."""
        groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
        if sum(group.total_byte_size for group in groups) > expands_to(self.content.size):
            raise unreadable(
                self.content.uri,
                f"expands to more than {BOMB_RATIO} times its size: write it without compression "
                "if that is right.",
            )

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        try:
            with (
                self.content.seekable() as stream,
                pq.ParquetFile(
                    stream,
                    buffer_size=BUFFER,
                    pre_buffer=False,
                    page_checksum_verification=True,
                ) as parquet,
            ):
                yield parquet
        except StageError:
            raise
        except _ERRORS as error:
            text = clip(f"can't be read as Parquet: {error}").rstrip(".")
            raise unreadable(self.content.uri, f"{text}. Write it again.") from error


def _batch(metadata: pq.FileMetaData) -> int:
    """How many rows to take at once: fewer where they are large."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    largest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=1)
    return int(max(1, min(BATCH, BATCH_BYTES // max(largest, 1))))


def _values(column: pa.Array) -> list[Any]:
    values: list[Any] = column.to_pylist()
    if not _is_messages(column.type):
        return values
    return [
        value and [item and {k: _filled(v) for k, v in item.items()} for item in value]
        for value in values
    ]


def _filled(value: Any) -> Any:
    """The value without the nulls that a struct has for keys which other rows have."""
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_null(kind)
    )


def _is_messages(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return bool(lists and pa.types.is_struct(kind.value_type))
