"""The header of a GGUF file. It may be damaged anywhere, so every length and offset is checked.

gguf-py's reader makes several objects of each string: a vocabulary of 49,000 entries took 7 s and
160 MB. This one walks over the bytes and decodes only what it is asked for. The format is
ggml-org/ggml's docs/gguf.md, version 3.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import gguf

MAGIC = b"GGUF"
VERSION = 3
MAX_DIMENSIONS = 4

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = "general.alignment"


class HeaderError(Exception):
    """The bytes are not those of a GGUF file; the message says where."""


@dataclass(frozen=True)
class Field:
    """One entry of the metadata."""

    type: int
    """The format's number of the value's type."""

    start: int
    end: int
    """Where the value's bytes are in the file."""


@dataclass(frozen=True)
class Tensor:
    """One entry of the table of tensors."""

    shape: tuple[int, ...]
    """The row's length first, as GGUF writes it."""

    type: gguf.GGMLQuantizationType
    offset: int
    """From the beginning of the file."""

    bytes: int

    @property
    def values(self) -> int:
        """How many numbers it holds."""
        count = 1
        for dimension in self.shape:
            count *= dimension
        return count


class Header:
    """A file's metadata and tensors; the file stays mapped until it is closed."""

    def __init__(self, file: Path) -> None:
        # Raises HeaderError where the file is not GGUF.
        with file.open("rb") as stream:
            if file.stat().st_size < 24:
                raise HeaderError("it ends before its header does")
            self.data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self.size = len(self.data)
        self.fields: dict[str, Field] = {}
        self.tensors: dict[str, Tensor] = {}
        try:
            self._read()
        except (struct.error, UnicodeDecodeError, OverflowError, ValueError) as error:
            self.data.close()
            raise HeaderError("its header is damaged, or the file was cut in it") from error
        except HeaderError:
            self.data.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.data.close()

    def value(self, key: str) -> Any:
        """A scalar or a string of the metadata; None if it is absent or an array."""
        field = self.fields.get(key)
        if field is None or field.type == _ARRAY:
            return None
        if field.type == _STRING:
            return self._string(field.start)[0]
        return self._unpack(_SCALARS[field.type], field.start)

    def strings(self, key: str) -> list[str] | None:
        """An array of strings of the metadata; None if it isn't one."""
        field = self.fields.get(key)
        if field is None or field.type != _ARRAY:
            return None
        if self._unpack("I", field.start) != _STRING:
            return None
        return list(self._strings(field.start + 12, self._unpack("Q", field.start + 4)))

    def numbers(self, key: str) -> list[Any] | None:
        """An array of numbers of the metadata; None if it isn't one."""
        field = self.fields.get(key)
        if field is None or field.type != _ARRAY:
            return None
        code = _SCALARS.get(self._unpack("I", field.start))
        if code is None:
            return None
        count = self._unpack("Q", field.start + 4)
        return list(struct.unpack_from(f"<{count}{code}", self.data, field.start + 12))

    def raw(self, key: str) -> bytes:
        """The bytes of a value, to compare."""
        field = self.fields[key]
        return self.data[field.start : field.end]

    def contents(self, name: str) -> bytes:
        """The bytes of a tensor."""
        tensor = self.tensors[name]
        return self.data[tensor.offset : tensor.offset + tensor.bytes]

    @property
    def end(self) -> int:
        """Where the last tensor ends. The file can't be smaller."""
        return max((t.offset + t.bytes for t in self.tensors.values()), default=0)

    def _read(self) -> None:
        if self.data[:4] != MAGIC:
            raise HeaderError("it does not begin with the letters GGUF")
        version, tensors, fields = struct.unpack_from("<IQQ", self.data, 4)
        if version != VERSION:
            raise HeaderError(f"it says that its format is version {version}, and not {VERSION}")
        place = 24
        for _ in range(fields):
            place = self._read_field(place)
        alignment = self.value(_ALIGNMENT) or 32
        listed = []
        for _ in range(tensors):
            entry, place = self._read_tensor(place)
            listed.append(entry)
        start = -(-place // alignment) * alignment
        for name, shape, kind, offset in listed:
            self.tensors[name] = _tensor(name, shape, kind, start + offset)
        if len(self.tensors) != tensors:
            raise HeaderError("two of its tensors have the same name")

    def _read_field(self, place: int) -> int:
        key, place = self._string(place)
        kind = self._unpack("I", place)
        start = place + 4
        end = self._end_of(kind, start)
        if end > self.size:
            raise HeaderError(f"the file ends in the metadata {key}")
        self.fields[key] = Field(kind, start, end)
        return end

    def _end_of(self, kind: int, start: int) -> int:
        if kind in _SCALARS:
            return start + struct.calcsize(f"<{_SCALARS[kind]}")
        if kind == _STRING:
            return self._string(start)[1]
        if kind != _ARRAY:
            raise HeaderError(f"its metadata has a value of the unknown type {kind}")
        inner, count = struct.unpack_from("<IQ", self.data, start)
        if inner in _SCALARS:
            return int(start + 12 + count * struct.calcsize(f"<{_SCALARS[inner]}"))
        if inner != _STRING:
            raise HeaderError(f"its metadata has an array of the type {inner}")
        place = start + 12
        for _ in range(count):
            place += 8 + self._unpack("Q", place)
        return place

    def _read_tensor(self, place: int) -> tuple[tuple[str, tuple[int, ...], int, int], int]:
        name, place = self._string(place)
        dimensions = self._unpack("I", place)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise HeaderError(f"the tensor {name} has {dimensions} dimensions")
        shape = struct.unpack_from(f"<{dimensions}Q", self.data, place + 4)
        place += 4 + 8 * dimensions
        kind, offset = struct.unpack_from("<IQ", self.data, place)
        return (name, shape, kind, offset), place + 12

    def _strings(self, place: int, count: int) -> Iterator[str]:
        for _ in range(count):
            text, place = self._string(place)
            yield text

    def _string(self, place: int) -> tuple[str, int]:
        length = self._unpack("Q", place)
        end = place + 8 + length
        if end > self.size:
            raise HeaderError("the file ends in its header")
        return self.data[place + 8 : end].decode(), end

    def _unpack(self, code: str, place: int) -> Any:
        return struct.unpack_from(f"<{code}", self.data, place)[0]


def _tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> Tensor:
    try:
        known = gguf.GGMLQuantizationType(kind)
    except ValueError as error:
        raise HeaderError(f"the tensor {name} has the unknown type {kind}") from error
    block, size = gguf.GGML_QUANT_SIZES[known]
    made = Tensor(shape, known, offset, 0)
    if shape[0] % block:
        raise HeaderError(f"the rows of the tensor {name} are no whole blocks of {known.name}")
    return Tensor(shape, known, offset, made.values // block * size)
