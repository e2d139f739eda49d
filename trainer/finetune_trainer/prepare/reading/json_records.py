"""JSON lines and JSON arrays of objects, read object by object.

NaN, and keys that stand twice in an object, are a fault only in what is used of it.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from typing import Any

from finetune_trainer.prepare.reading.content import Content, unreadable
from finetune_trainer.prepare.reading.encoding import (
    MAX_LINE,
    LongLineError,
    Text,
    open_lines,
    open_text,
)
from finetune_trainer.prepare.reading.record import DamageError, Oddities, Row, name_of

KEYS_FROM = 100  # objects whose keys together are the columns
KEYS_SIZE = 1 << 16  # characters of keys; an object with more tells nothing
_PIECE = 1 << 20  # characters
_SPACE = re.compile(r"[ \t\r\n]*")

Item = tuple[int, Any]
"""Number of a line or element, and its value or why it has none (NotJsonError)."""


class NotJsonError(Exception):
    """The text is no JSON; the message says why and where."""


class _Repeated(dict[str, Any]):
    """An object in which keys stand twice; the last value of each counts."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.twice = {key for key, count in Counter(k for k, _ in pairs).items() if count > 1}


class _Decoder:
    """JSON as Python reads it, which remembers whether keys stood twice in the latest value."""

    def __init__(self) -> None:
        self._repeats = False
        self._json = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        self._repeats = True
        return _Repeated(pairs)

    def parse(self, text: str) -> Any:
        """The value of a whole text; raises NotJsonError."""
        self._repeats = False
        try:
            return self._json.decode(text)
        except json.JSONDecodeError as error:
            raise NotJsonError(f"{error.msg} at character {error.pos + 1}") from error
        except (RecursionError, ValueError) as error:
            raise NotJsonError(_why(error)) from None

    def parse_at(self, text: str, position: int) -> tuple[Any, int]:
        """The value that begins there, and its end; raises what json raises."""
        self._repeats = False
        return self._json.raw_decode(text, position)

    def repeated(self, value: Any, wanted: Collection[str] | None = None) -> str | None:
        """A key that stands twice in the latest value: one of those wanted, or below them."""
        return _repeated(value, wanted) if self._repeats else None


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return "a number in it has thousands of digits"  # Python's limit for an integer


def _repeated(value: Any, wanted: Collection[str] | None) -> str | None:
    waiting: list[tuple[Any, Collection[str] | None]] = [(value, wanted)]
    while waiting:
        value, wanted = waiting.pop()
        if isinstance(value, _Repeated):
            for key in value.twice:
                if wanted is None or key in wanted:
                    return key
        if isinstance(value, dict):
            waiting += [(part, None) for key, part in value.items() if not wanted or key in wanted]
        elif isinstance(value, list):
            waiting += [(part, None) for part in value]
    return None


def parse(text: str) -> Any:
    """The value of a whole text, in which no key stands twice; raises NotJsonError."""
    decoder = _Decoder()
    value = decoder.parse(text)
    if (key := decoder.repeated(value)) is not None:
        raise NotJsonError(_twice(key))
    return value


def _twice(key: str) -> str:
    return f"the key {name_of(key)} occurs twice"


class JsonRecords(ABC):
    """A file of JSON objects whose keys are known."""

    unit: str
    format: str
    empty: str
    """What to say when there are no rows."""

    def __init__(self, content: Content, text: Text) -> None:
        self.content = content
        self.text = text
        self.oddities = Oddities()
        self._decoder = _Decoder()
        self.shapes = _shapes(self.items())
        self.fields = list(dict.fromkeys(chain.from_iterable(self.shapes)))

    @property
    def described(self) -> dict[str, str | None]:
        """What is special about the format, for Detected."""
        return {"encoding": self.text.encoding}

    def rows(self, wanted: Sequence[str], optional: Collection[str] = ()) -> Iterator[Row]:  # noqa: ARG002 - may be null
        """The wanted values of each object; raises DamageError."""
        for number, value in self.items():
            if isinstance(value, dict):
                if (key := self._decoder.repeated(value, wanted)) is not None:
                    yield number, number, _twice(key)
                else:
                    yield number, number, [value.get(key) for key in wanted]
            elif isinstance(value, NotJsonError):
                yield number, number, f"it is no JSON: {value}"
            else:
                yield number, number, "it is no JSON object, {…}"

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """Number and value of each line or element; raises DamageError."""


class JsonLines(JsonRecords):
    """A JSON lines file."""

    unit = "line"
    format = "jsonl"
    empty = "has no lines: write an object into each"

    def __init__(self, content: Content, text: Text) -> None:
        super().__init__(content, text)
        if not self.fields and self._spread():
            raise unreadable(
                content.uri,
                "has JSON over several lines: put each object on a line of its own "
                "(`jq -c . file`), or all of them into one array.",
            )

    def _spread(self) -> bool:
        """Whether the first line opens an object that it does not close."""
        with suppress(LongLineError), open_lines(self.content, self.text) as lines:
            first = next((line.strip() for line in lines if line.strip()), "")
            return not first.endswith("}")
        return False

    def items(self) -> Iterator[Item]:
        """Number and value of each line that is not blank."""
        number = 0
        with open_lines(self.content, self.text) as lines:
            try:
                for number, line in enumerate(lines, start=1):
                    if line.strip(" \t\r\n"):
                        yield number, self._value(line)
            except LongLineError:
                cause = f"it has over {MAX_LINE:,} characters"
                raise DamageError(number + 1, number + 1, cause) from None

    def _value(self, line: str) -> Any:
        try:
            return self._decoder.parse(line)
        except NotJsonError as error:
            return error


class JsonArray(JsonRecords):
    """A JSON array."""

    unit = "element"
    format = "json"
    empty = "is an empty array: write objects into it"

    def items(self) -> Iterator[Item]:
        """Number and value of each element."""
        with open_text(self.content, self.text) as stream:
            window = _Window(stream.read, self._decoder)
            window.expect("[", 1)
            number = 1
            if window.next() == "]":
                window.position += 1
            else:
                yield number, window.value(number)
                while window.expect(",]", number) == ",":
                    number += 1
                    yield number, window.value(number)
            if rest := window.next():
                raise DamageError(number, number, f"{rest!r} follows the end of the array")


class _Window:
    """The part of the text in which the next element lies."""

    def __init__(self, read: Callable[[int], str], decoder: _Decoder) -> None:
        self._read = read
        self._decoder = decoder
        self._text = ""
        self._ended = False
        self.position = 0

    def _more(self) -> bool:
        """Grow the window, by more the larger it is; false at the end of the text."""
        self._text = self._text[self.position :]
        self.position = 0
        piece = self._read(max(_PIECE, len(self._text)))
        self._text += piece
        self._ended = not piece
        return bool(piece)

    def next(self) -> str:
        """The next character that is no space, without taking it; "" at the end."""
        while True:
            found = _SPACE.match(self._text, self.position)
            self.position = found.end() if found else self.position
            if self.position < len(self._text):
                return self._text[self.position]
            if not self._more():
                return ""

    def expect(self, marks: str, number: int) -> str:
        """Take one of these characters; raises DamageError where there is another."""
        found = self.next()
        if not found:
            raise DamageError(number, number, "the array is never closed")
        if found not in marks:
            cause = f"{found!r} follows it where {' or '.join(map(repr, marks))} is due"
            raise DamageError(number, number, cause)
        self.position += 1
        return found

    def value(self, number: int) -> object:
        """Take the next element; raises DamageError where it can't be told where it ends."""
        self.next()
        while True:
            try:
                value, end = self._decoder.parse_at(self._text, self.position)
            except json.JSONDecodeError as error:
                cause = f"it is no JSON: {error.msg}"
            except (RecursionError, ValueError) as error:
                raise DamageError(number, number, f"it is no JSON: {_why(error)}") from None
            else:
                if end < len(self._text) or self._ended:  # else a number may go on
                    self.position = end
                    return value
                cause = ""
            if len(self._text) - self.position > MAX_LINE:
                cause = f"it has over {MAX_LINE:,} characters, or is never closed"
                raise DamageError(number, number, cause)
            if not self._more() and cause:
                raise DamageError(number, number, cause)


def _shapes(items: Iterator[Item]) -> list[tuple[str, ...]]:
    """The different keys of the first objects, in the order in which they come."""
    found: dict[tuple[str, ...], None] = {}
    with suppress(DamageError):  # it is reported where rows are read
        objects = (value for _, value in items if isinstance(value, dict))
        for value in islice(objects, KEYS_FROM):
            if sum(map(len, value)) <= KEYS_SIZE:
                found[tuple(value)] = None
    return list(found)
