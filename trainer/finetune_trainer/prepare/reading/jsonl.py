"""JSON lines: an object a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from finetune_trainer.prepare.reading.content import Content, unreadable
from finetune_trainer.prepare.reading.encoding import Text
from finetune_trainer.prepare.reading.lines import MAX_LINE, LongLineError, open_lines
from finetune_trainer.prepare.reading.record import DamageError, Row
from finetune_trainer.prepare.reading.strict_json import NotJsonError, parse

KEYS_FROM = 100  # objects whose keys together are the columns
KEYS_SIZE = 1 << 20  # characters of keys, after which no further ones are looked for

Item = tuple[int, Any]
"""Number of a line or element, and its value or why it has none (NotJsonError)."""


class JsonLines:
    """A JSON lines file whose keys are known."""

    unit = "line"
    format = "jsonl"

    def __init__(self, content: Content, text: Text) -> None:
        self.content = content
        self.text = text
        self.fields = keys(self.items())
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
        return values(self.items(), wanted)

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


def keys(items: Iterator[Item]) -> list[str]:
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


def values(items: Iterator[Item], wanted: Sequence[str]) -> Iterator[Row]:
    """The wanted values of each object."""
    for number, value in items:
        if isinstance(value, dict):
            yield number, number, [value.get(key) for key in wanted]
        elif isinstance(value, NotJsonError):
            yield number, number, f"it is no JSON: {value}"
        else:
            yield number, number, "it is no JSON object, {…}"
