"""A text stream, line by line, with an end to how long a line may be."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

from finetune_trainer.prepare.reading.content import Content
from finetune_trainer.prepare.reading.encoding import Text

MAX_LINE = 16 << 20  # characters: more than any model's context holds


class LongLineError(Exception):
    """A line is longer than MAX_LINE."""


@contextmanager
def open_text(content: Content, text: Text) -> Iterator[io.TextIOWrapper]:
    """The decoded text, without its byte order mark and with its line ends as they are."""
    with content.open() as plain:
        plain.read(text.mark)
        with io.TextIOWrapper(plain, encoding=text.encoding, newline="") as stream:
            yield stream


@contextmanager
def open_lines(content: Content, text: Text) -> Iterator[Iterator[str]]:
    """Lines with their ends, which may be \\n, \\r\\n or \\r; iterating raises LongLineError."""
    with open_text(content, text) as stream:
        yield _lines(stream)


def _lines(stream: io.TextIOWrapper) -> Iterator[str]:
    read = stream.readline
    while line := read(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise LongLineError
        yield line
