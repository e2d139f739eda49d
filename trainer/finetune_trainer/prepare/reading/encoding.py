"""Which encoding a text has, and that all of it can be read: one pass over the whole file.

A byte order mark or the zero bytes of the first two letters give UTF-16 and UTF-32 away, and what
is valid as UTF-8 throughout is UTF-8. Only then can it be a Western single-byte encoding, which
every byte string is "valid" as; it is accepted where the text looks like one, and refused with the
position of the first byte otherwise. Guessing further would train on garbled words.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass

from finetune_trainer.prepare.reading.content import CHUNK, Content, unreadable
from finetune_trainer.prepare.reading.western import western_encoding

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Of the first four bytes, those that are zero in ASCII text.
_ZEROS = {
    (False, True, True, True): "utf-32-le",
    (True, True, True, False): "utf-32-be",
    (False, True, False, True): "utf-16-le",
    (True, False, True, False): "utf-16-be",
}
_REMEDY = "Save it as UTF-8."


@dataclass(frozen=True)
class Text:
    """How the content is read as text, and what stands in it."""

    encoding: str
    mark: int
    """Bytes of the byte order mark."""

    blank: bool
    """Whether there is nothing but white space."""

    backslash: bool
    """Whether there is a backslash anywhere."""

    single: bool
    """Whether anywhere a cell begins with a single quote."""

    spaced: bool
    """Whether anywhere a double quote follows a delimiter and a space."""


def read_as_text(content: Content) -> Text:
    """Find the encoding and decode everything once; raises StageError (DatasetUnreadable)."""
    encoding, mark = _declared(content.start)
    if encoding:
        return _survey(content, encoding, mark)
    try:
        return _survey(content, "utf-8", 0)
    except _BadByteError as error:
        encoding, doubt = western_encoding(content)
        if encoding is None:
            raise unreadable(content.uri, f"{error.message} {doubt} {_REMEDY}") from error
        return _survey(content, encoding, 0)


def _declared(start: bytes) -> tuple[str | None, int]:
    for bom, encoding in _MARKS:
        if start.startswith(bom):
            return encoding, len(bom)
    zeros = tuple(byte == 0 for byte in start[:4])
    return _ZEROS.get(zeros), 0  # type: ignore[arg-type]


class _BadByteError(Exception):
    """A byte that UTF-8 does not have."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


def _survey(content: Content, encoding: str, mark: int) -> Text:
    blank, backslash, single, spaced = True, False, False, False
    last = "\n"
    for text in _decoded(content, encoding, mark):
        piece = last + text
        last = text[-2:] or last
        blank = blank and not text.strip()
        backslash = backslash or "\\" in text
        single = single or ("'" in text and bool(_SINGLE.search(piece)))
        spaced = spaced or ('"' in text and bool(_SPACED.search(piece)))
    return Text(encoding, mark, blank, backslash, single, spaced)


_SINGLE = re.compile("(?:^|[\r\n,;\t|])'")
_SPACED = re.compile('[,;\t|] "')


def _decoded(content: Content, encoding: str, mark: int) -> Iterator[str]:
    """The text in chunks; what can't be read raises StageError with its position."""
    decoder = codecs.getincrementaldecoder(encoding)()
    with content.open() as stream:
        position = len(stream.read(mark))
        while True:
            chunk = stream.read(CHUNK)
            waiting = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                at = position - waiting + error.start
                raise _bad(content, at, byte, encoding, mark) from None
            if "\0" in text:
                before = text[: text.index("\0")].encode(encoding)
                raise unreadable(
                    content.uri,
                    f"is no text: byte {position - waiting + len(before)} (0x00) can't be in one. "
                    "Export it as CSV in UTF-8.",
                )
            if text:
                yield text
            if not chunk:
                return
            position += len(chunk)


def _bad(content: Content, position: int, byte: int, encoding: str, mark: int) -> Exception:
    text = f"is not {encoding.upper()} text: byte {position} (0x{byte:02x}) can't be read."
    if encoding == "utf-8" and not mark:
        return _BadByteError(text)
    return unreadable(content.uri, f"{text} {_REMEDY}")
