"""What kind of file it is, by its first bytes; its bytes unpacked; and rows of Parquet."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.prepare.reading.record import Oddities, Row, clip, name_of, names, plural

CHUNK = 1 << 20  # bytes
START = 1 << 16  # bytes that tell what a file is

BOMB_RATIO = 200  # text shrinks to a fifth or a tenth; deflate can do up to 1,032
BOMB_FLOOR = 64 << 20  # bytes that may come out of any file
XZ_MEMORY = 128 << 20  # bytes; `xz -9` needs 65 MiB to unpack

PARQUET = b"PAR1"
ZIP = "zip"
COMPRESSIONS: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"PK\x03\x04", ZIP),
)
_BZIP2_BLOCK = b"1AY&SY"  # behind the magic and a digit

_EXPORT = "export it as CSV"
_UNPACK = "unpack it, or compress it with gzip"

FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x05\x06", "an empty zip archive", "upload the table itself"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel workbook (.xls)", _EXPORT),
    (b"%PDF", "a PDF document", "write the examples into a CSV file"),
    (b"{\\rtf", "a rich text document", "write the examples into a CSV file"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (b"ARROW1\x00\x00", "an Arrow file", "write it as Parquet"),
    (b"FEA1", "a Feather file", "write it as Parquet"),
    (b"Obj\x01", "an Avro file", "write it as Parquet or JSON lines"),
    (b"SQLite format 3\x00", "an SQLite database", "export the table as CSV"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "write it as Parquet"),
    (b"\x93NUMPY", "a NumPy array", "write it as Parquet"),
    (b"\x80\x04\x95", "a Python pickle", "write it as Parquet or JSON lines"),
    (b"\x80\x05\x95", "a Python pickle", "write it as Parquet or JSON lines"),
    (b"\x89PNG", "an image", "write the examples into a CSV file"),
    (b"\xff\xd8\xff", "an image", "write the examples into a CSV file"),
    (b"\x7fELF", "a program", "correct spec.dataset.source"),
    (
        b"version https://git-lfs.github.com/spec/",
        "a pointer of Git LFS and not the file itself",
        "fetch it with `git lfs pull` and upload that",
    ),
)
_MARKUP = (b"<!doctype html", b"<html", b"<?xml")
# Folders and files by which zip archives of office programs are known.
_OFFICE = {"xl": "an Excel workbook", "word": "a Word document", "ppt": "a presentation"}
_OPEN_DOCUMENT = "META-INF"


def expands_to(size: int) -> int:
    """Bytes that may come out of a compressed file of this size."""
    return max(BOMB_FLOOR, size * BOMB_RATIO)


def unreadable(uri: str, text: str) -> StageError:
    """The file as a whole can't be read."""
    return StageError(Reason.DATASET_UNREADABLE, f"{uri} {text}")


def foreign(start: bytes, uri: str) -> StageError | None:
    """The error for a file that is something else by its first bytes, with the remedy."""
    for magic, what, remedy in FOREIGN:
        if start.startswith(magic):
            return unreadable(uri, f"is {what}, not CSV, JSON lines or Parquet: {remedy}.")
    if start.startswith(b"ORC") and b"\0" in start:
        return unreadable(
            uri, "is an ORC file, not CSV, JSON lines or Parquet: write it as Parquet."
        )
    if start[257:262] == b"ustar":
        return unreadable(uri, "is a tar archive, not CSV, JSON lines or Parquet: unpack it.")
    if start.lstrip(b"\xef\xbb\xbf\r\n\t ").lower().startswith(_MARKUP):
        return unreadable(
            uri,
            "is an HTML or XML page, not CSV, JSON lines or Parquet: was a login or error page "
            "saved in its place?",
        )
    return None


def compression_of(start: bytes) -> str | None:
    """How a file that begins like this is compressed."""
    for magic, name in COMPRESSIONS:
        if start.startswith(magic) and (name != "bzip2" or start[4:10] == _BZIP2_BLOCK):
            return name
    return None


class Content:
    """The bytes of a file, unpacked on the way; never more than a chunk of them in memory."""

    def __init__(self, file: Path, uri: str) -> None:
        self.file = file
        self.uri = uri
        with file.open("rb") as stream:
            self.compression = compression_of(stream.read(16))
        self.size = file.stat().st_size
        with self.open() as stream:
            self.start = stream.read(START)
        inner = compression_of(self.start)
        if self.compression and inner:
            raise unreadable(
                uri, f"is compressed twice ({self.compression}, {inner}): compress it once."
            )

    def open(self) -> BinaryIO:
        """A stream of the unpacked bytes; reading it raises StageError where they are damaged."""
        if not self.compression:
            return self.file.open("rb")
        with ExitStack() as stack:
            try:
                stream = _unpacking(self.file, self.compression, self.uri, stack)
            except _DAMAGES as error:
                raise _damaged(self.uri, self.compression, error) from error
            unpacked = _Unpacked(stream, stack.pop_all(), self)
        return io.BufferedReader(unpacked, CHUNK)

    @contextmanager
    def seekable(self) -> Iterator[BinaryIO]:
        """A stream of the unpacked bytes for a format that needs to jump around in them."""
        if not self.compression:
            with self.file.open("rb") as plain:
                yield plain
            return
        with self.open() as stream, tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(stream, unpacked, CHUNK)
            unpacked.seek(0)
            yield unpacked


_DAMAGES = (
    EOFError, OSError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, pa.ArrowException,
    NotImplementedError,
)  # fmt: skip


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def _damaged(uri: str, compression: str, error: Exception) -> StageError:
    if isinstance(error, NotImplementedError):  # a method that zipfile does not know
        return unreadable(uri, f"can't be unpacked ({error}): {_UNPACK}.")
    return unreadable(
        uri, f"is damaged: its {compression} data can't be read ({error}). Upload it again."
    )


def _unpacking(file: Path, compression: str, uri: str, stack: ExitStack) -> _Readable:
    if compression == ZIP:
        archive = stack.enter_context(zipfile.ZipFile(file))
        return stack.enter_context(archive.open(_only_member(archive, uri)))
    plain = stack.enter_context(file.open("rb"))
    if compression == "gzip":
        return stack.enter_context(gzip.GzipFile(fileobj=plain, mode="rb"))
    if compression == "bzip2":
        return stack.enter_context(bz2.BZ2File(plain))
    if compression == "xz":
        _check_xz_memory(plain)
        return stack.enter_context(lzma.LZMAFile(plain))
    unpacked: _Readable = stack.enter_context(pa.CompressedInputStream(plain, "zstd"))
    return unpacked


def _check_xz_memory(plain: BinaryIO) -> None:
    """Raise LZMAError when unpacking would take too much memory; it is for the writer to choose."""
    lzma.LZMADecompressor(memlimit=XZ_MEMORY).decompress(plain.read(1 << 12), max_length=1)
    plain.seek(0)


def _only_member(archive: zipfile.ZipFile, uri: str) -> zipfile.ZipInfo:
    """The file in a zip archive, as Kaggle packs it; raises StageError where there are more."""
    paths = [PurePosixPath(info.filename) for info in archive.infolist()]
    tops = {path.parts[0] for path in paths if path.parts}
    for folder, what in _OFFICE.items():
        if folder in tops:
            raise unreadable(uri, f"is {what}, not CSV, JSON lines or Parquet: {_EXPORT}.")
    if _OPEN_DOCUMENT in tops and PurePosixPath("mimetype") in paths:
        raise unreadable(uri, f"is an OpenDocument file (.ods): {_EXPORT}.")
    members = [
        info
        for info, path in zip(archive.infolist(), paths, strict=True)
        if path.parts  # a damaged archive may name nothing
        and not info.is_dir()
        and path.parts[0] != "__MACOSX"
        and not path.name.startswith(".")
    ]
    if len(members) != 1:
        found = f" ({names(info.filename for info in members)})" if members else ""
        raise unreadable(
            uri,
            f"is a zip archive of {plural(len(members), 'file')}{found}: unpack it and name the "
            "folder, or pack one file alone.",
        )
    if members[0].flag_bits & 1:
        raise unreadable(uri, "is a zip archive with a password: pack it without.")
    return members[0]


class _Unpacked(io.RawIOBase):
    """An unpacked stream with errors for people, and an end to what a file may expand to."""

    def __init__(self, stream: _Readable, stack: ExitStack, content: Content) -> None:
        self._stream = stream
        self._stack = stack
        self._content = content
        self._limit = expands_to(content.size)
        self._done = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        target = memoryview(buffer)  # type: ignore[arg-type]
        data = self._read(len(target))
        target[: len(data)] = data
        self._done += len(data)
        if self._done > self._limit:
            raise unreadable(
                self._content.uri,
                f"expands to over {self._limit >> 20:,} MiB, more than {BOMB_RATIO} times its "
                "size: upload it without compression if that is right.",
            )
        return len(data)

    def _read(self, size: int) -> bytes:
        uri, compression = self._content.uri, str(self._content.compression)
        try:
            return self._stream.read(size)
        except _DAMAGES as error:
            if isinstance(error, EOFError) or "Truncated" in str(error):
                raise unreadable(
                    uri,
                    f"is cut off: after {self._content.size:,} bytes it ends within its "
                    f"{compression} data. Upload it again.",
                ) from error
            raise _damaged(uri, compression, error) from error

    def close(self) -> None:
        self._stack.close()
        super().close()


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
