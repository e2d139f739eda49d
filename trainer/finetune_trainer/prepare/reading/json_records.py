"""JSON lines and JSON arrays of objects, read object by object."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from finetune_trainer.prepare.reading.content import Content, unreadable
from finetune_trainer.prepare.reading.encoding import (
    MAX_LINE,
    LongLineError,
    Text,
    open_lines,
    open_text,
)
from finetune_trainer.prepare.reading.record import DamageError, Row

KEYS_FROM = 100  # objects whose keys together are the columns
KEYS_SIZE = 1 << 20  # characters of keys; with more, no further keys are looked for
_PIECE = 1 << 20  # characters
_SPACE = re.compile(r"[ \t\r\n]*")

Item = tuple[int, Any]
"""Number of a line or element, and its value or why it has none (NotJsonError)."""


class NotJsonError(Exception):
    """The text is no JSON; the message says why and where."""


def _constant(name: str) -> NoReturn:
    raise NotJsonError(f"{name} is no JSON value")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise NotJsonError(f"the key {twice[:60]!r} occurs twice")
    return found


DECODER = json.JSONDecoder(parse_constant=_constant, object_pairs_hook=_pairs)


def parse(text: str) -> Any:
    """The value of a whole text; raises NotJsonError."""
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise NotJsonError(f"{error.msg} at character {error.pos + 1}") from error
    except RecursionError:
        raise NotJsonError("it is nested too deeply") from None
    except ValueError:  # Python's limit for the digits of an integer
        raise NotJsonError("a number in it has thousands of digits") from None


class JsonLines:
    """A JSON lines file whose keys are known."""

    unit = "line"
    format = "jsonl"

    def __init__(self, content: Content, text: Text) -> None:
        self.content = content
        self.text = text
        self.fields = _keys(self.items())
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

    @property
    def described(self) -> dict[str, str | None]:
        """What is special about the format, for Detected."""
        return {"encoding": self.text.encoding}

    @property
    def empty(self) -> str:
        """What to say when there are no rows."""
        return "has no lines: write an object into each"

    def rows(self, wanted: Sequence[str]) -> Iterator[Row]:
        """The lines that are not blank."""
        return _values(self.items(), wanted)

    def items(self) -> Iterator[Item]:
        """Number and value of each line; raises DamageError."""
        number = 0
        with open_lines(self.content, self.text) as lines:
            try:
                for number, line in enumerate(lines, start=1):
                    if line.strip(" \t\r\n"):
                        yield number, _value(line)
            except LongLineError:
                cause = f"it has over {MAX_LINE:,} characters"
                raise DamageError(number + 1, number + 1, cause) from None


def _value(line: str) -> Any:
    try:
        return parse(line)
    except NotJsonError as error:
        return error


class JsonArray:
    """A JSON array whose objects' keys are known."""

    unit = "element"
    format = "json"

    def __init__(self, content: Content, text: Text) -> None:
        self.content = content
        self.text = text
        self.fields = _keys(self.items())

    @property
    def described(self) -> dict[str, str | None]:
        """What is special about the format, for Detected."""
        return {"encoding": self.text.encoding}

    @property
    def empty(self) -> str:
        """What to say when there are no rows."""
        return "is an empty array: write objects into it"

    def rows(self, wanted: Sequence[str]) -> Iterator[Row]:
        """The elements; raises DamageError."""
        return _values(self.items(), wanted)

    def items(self) -> Iterator[Item]:
        """Number and value of each element; raises DamageError."""
        with open_text(self.content, self.text) as stream:
            window = _Window(stream.read)
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

    def __init__(self, read: Callable[[int], str]) -> None:
        self._read = read
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
        """Take the next element; what is wrong in it alone is returned as NotJsonError."""
        self.next()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self.position)
            except json.JSONDecodeError as error:
                cause = f"it is no JSON: {error.msg}"
            except (NotJsonError, RecursionError, ValueError) as error:
                why = "it is nested too deeply" if isinstance(error, RecursionError) else error
                raise DamageError(number, number, f"it is no JSON: {why}") from None
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


def _keys(items: Iterator[Item]) -> list[str]:
    """The keys of the first objects, in the order in which they come."""
    found: dict[str, None] = {}
    seen = 0
    try:
        for _, value in items:
            if isinstance(value, dict):
                found.update(dict.fromkeys(value))
                seen += 1
                if seen == KEYS_FROM or sum(map(len, found)) > KEYS_SIZE:
                    break
    except DamageError:
        pass  # it is reported where rows are read
    return list(found)


def _values(items: Iterator[Item], wanted: Sequence[str]) -> Iterator[Row]:
    """The wanted values of each object."""
    for number, value in items:
        if isinstance(value, dict):
            yield number, number, [value.get(key) for key in wanted]
        elif isinstance(value, NotJsonError):
            yield number, number, f"it is no JSON: {value}"
        else:
            yield number, number, "it is no JSON object, {…}"
