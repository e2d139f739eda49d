"""What kind of file it is, by its first bytes, and its bytes without the compression."""

from __future__ import annotations

import gzip
import io
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from finetune_trainer.contract import Reason, StageError

CHUNK = 1 << 20  # bytes
START = 1 << 16  # bytes that tell what a file is

BOMB_RATIO = 200  # text shrinks to a fifth or a tenth; deflate can do up to 1,032
BOMB_FLOOR = 64 << 20  # bytes that may come out of any file

GZIP = b"\x1f\x8b"
PARQUET = b"PAR1"

_EXPORT = "export it as CSV"
_UNPACK = "unpack it, or compress it with gzip"

FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a spreadsheet or zip archive", f"{_EXPORT} or unpack it"),
    (b"PK\x05\x06", "an empty zip archive", "upload the table itself"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel workbook (.xls)", _EXPORT),
    (b"%PDF", "a PDF document", "write the examples into a CSV file"),
    (b"{\\rtf", "a rich text document", "write the examples into a CSV file"),
    (b"BZh91AY&SY", "a bzip2 archive", _UNPACK),
    (b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
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


class Content:
    """The bytes of a file, unzipped on the way; never more than a chunk of them in memory."""

    def __init__(self, file: Path, uri: str) -> None:
        self.file = file
        self.uri = uri
        with file.open("rb") as stream:
            magic = stream.read(2)
        self.compression = "gzip" if magic == GZIP else None
        self.size = file.stat().st_size
        with self.open() as stream:
            self.start = stream.read(START)

    def open(self) -> BinaryIO:
        """A stream of the unzipped bytes; reading it raises StageError where they are damaged."""
        plain = self.file.open("rb")
        if not self.compression:
            return plain
        return io.BufferedReader(_Unzipped(plain, self.size, self.uri), CHUNK)

    @contextmanager
    def seekable(self) -> Iterator[BinaryIO]:
        """A stream of the unzipped bytes for a format that needs to jump around in them."""
        if not self.compression:
            with self.file.open("rb") as plain:
                yield plain
            return
        with self.open() as stream, tempfile.TemporaryFile() as unzipped:
            shutil.copyfileobj(stream, unzipped, CHUNK)
            unzipped.seek(0)
            yield unzipped


class _Unzipped(io.RawIOBase):
    """A gzip stream with errors for people, and an end to what a small file may expand to."""

    def __init__(self, plain: BinaryIO, size: int, uri: str) -> None:
        self._plain = plain
        self._gzip = gzip.GzipFile(fileobj=plain, mode="rb")
        self._size = size
        self._limit = expands_to(size)
        self._uri = uri
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
                self._uri,
                f"expands to over {self._limit >> 20:,} MiB, more than {BOMB_RATIO} times its "
                "size: upload it without compression if that is right.",
            )
        return len(data)

    def _read(self, size: int) -> bytes:
        try:
            return self._gzip.read(size)
        except EOFError as error:
            raise unreadable(
                self._uri,
                f"is cut off: after {self._size:,} bytes it ends within its gzip data. "
                "Upload it again.",
            ) from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise unreadable(
                self._uri,
                f"is damaged: its gzip data can't be read ({error}). Upload it again.",
            ) from error

    def close(self) -> None:
        self._gzip.close()
        self._plain.close()
        super().close()
