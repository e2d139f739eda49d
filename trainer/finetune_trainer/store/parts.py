"""A file as the parts of an upload, each with its MD5, read once and in order.

The same pass computes the SHA-256 of the whole, so that what the store checks part by part is the
file that was described when it was finished.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer.contract import Reason, StageError

PART_BYTES = 8 << 20
"""Smallest part, and the largest file that goes in one piece; S3 wants at least 5 MiB."""

MOST_PARTS = 10_000  # S3's limit for one object
_MEBIBYTE = 1 << 20
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Part:
    """A stretch of a file."""

    number: int
    """From 1, as S3 counts."""

    start: int
    size: int
    md5: bytes

    @property
    def etag(self) -> str:
        """What a store calls a part of this content."""
        return self.md5.hex()

    @property
    def content_md5(self) -> str:
        """The Content-MD5 header, by which the store checks what arrived."""
        return b64encode(self.md5).decode()


def fits_one_request(size: int) -> bool:
    """Whether a file of so many bytes goes in one piece."""
    return size <= PART_BYTES


def part_size(size: int) -> int:
    """Bytes of each part but the last: whole MiB, the same for every file of this size."""
    needed = -(-size // MOST_PARTS)
    return max(PART_BYTES, -(-needed // _MEBIBYTE) * _MEBIBYTE)


def read_part(source: Path, number: int, size: int) -> Part:
    """One part of a file, where parts have `size` bytes."""
    start = (number - 1) * size
    md5 = hashlib.md5(usedforsecurity=False)
    done = 0
    with source.open("rb") as stream:
        stream.seek(start)
        while chunk := stream.read(min(_CHUNK, size - done)):
            md5.update(chunk)
            done += len(chunk)
    return Part(number, start, done, md5.digest())


def read_parts(source: Path, size: int, sha256: str | None) -> Iterator[Part]:
    """The parts of a file of `size` bytes, the last of them after the whole was checked.

    Raises ChangedFileError when the file has not this size and SHA-256 (any more).
    """
    whole, length = hashlib.sha256(), part_size(size)
    with source.open("rb") as stream:
        for number, start in enumerate(range(0, size, length), start=1):
            md5, left = hashlib.md5(usedforsecurity=False), min(length, size - start)
            while left and (chunk := stream.read(min(_CHUNK, left))):
                md5.update(chunk)
                whole.update(chunk)
                left -= len(chunk)
            last = start + length >= size
            if left or (last and stream.read(1)):
                raise ChangedFileError(source)
            if last:
                check_sha256(source, whole.hexdigest(), sha256)
            yield Part(number, start, min(length, size - start), md5.digest())


def check_sha256(source: Path, found: str, expected: str | None) -> None:
    """ChangedFileError when a file is not what it was when it was finished."""
    if expected is not None and found != expected:
        raise ChangedFileError(source)


class ChangedFileError(StageError):
    """A file was altered on disk; the next attempt writes it anew."""

    def __init__(self, source: Path) -> None:
        super().__init__(
            Reason.INTERNAL_ERROR,
            f"{source.name} is not what was written: its bytes on the disk have changed since its "
            "SHA-256 was taken, so it is not uploaded. The stage can be tried again; should it "
            "happen once more, look at the disk and the memory of the node.",
        )


def multipart_etag(digests: list[bytes]) -> str:
    """What S3 calls an object that was put together from parts with these MD5 digests."""
    joined = hashlib.md5(b"".join(digests), usedforsecurity=False)
    return f"{joined.hexdigest()}-{len(digests)}"
