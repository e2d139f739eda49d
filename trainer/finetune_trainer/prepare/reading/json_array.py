"""A file that is one JSON array of objects, read element by element."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence

from finetune_trainer.prepare.reading.content import Content
from finetune_trainer.prepare.reading.encoding import Text
from finetune_trainer.prepare.reading.jsonl import Item, keys, values
from finetune_trainer.prepare.reading.lines import MAX_LINE, open_text
from finetune_trainer.prepare.reading.record import DamageError, Row
from finetune_trainer.prepare.reading.strict_json import DECODER, NotJsonError

_PIECE = 1 << 20  # characters
_SPACE = re.compile(r"[ \t\r\n]*")


class JsonArray:
    """A JSON array whose objects' keys are known."""

    unit = "element"
    format = "json"

    def __init__(self, content: Content, text: Text) -> None:
        self.content = content
        self.text = text
        self.fields = keys(self.items())

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
        return values(self.items(), wanted)

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
