"""A file as text: its encoding, and its lines.

UTF-8, and UTF-16 and UTF-32 by their marks or zeros; anything else has to be named in
spec.dataset.encoding. What can't be decoded ends the reading with the position of the byte and
what the encoding may be: a guess is shown to a person and never acted on.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from charset_normalizer import from_bytes

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.prepare.reading.content import CHUNK, Content, unreadable

MAX_LINE = 16 << 20  # characters: more than any model's context holds
SAMPLE = 1 << 14  # bytes of lines with letters outside ASCII that a guess is made from
GUESSES = 2  # encodings that a message names: several fit a short text
BEGINNING = 1 << 10  # characters that tell JSON from a table

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
# Encodings in which spreadsheets and editors have saved files, as Python names them.
_USUAL = [
    "cp1250", "cp1251", "cp1252", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258",
    "iso8859_2", "iso8859_15", "mac_roman", "cp437", "cp850", "cp866", "cp874", "koi8_r", "koi8_u",
    "shift_jis", "euc_jp", "gb18030", "big5", "cp949",
]  # fmt: skip
_EXCEL = "cp1252"  # what Excel writes in most of Europe and the Americas
# Python's own codecs that stand for no encoding of files.
_NO_CHARSETS = {"idna", "punycode", "raw-unicode-escape", "undefined", "unicode-escape"}


@dataclass(frozen=True)
class Text:
    """How the content is read as text."""

    encoding: str
    mark: int = 0
    """Bytes of the byte order mark."""

    named: bool = False
    """Whether the user named the encoding."""


def check_encoding(name: str | None) -> None:
    """Raise StageError(InvalidConfig) when Python knows no such text encoding."""
    if name is None:
        return
    try:
        known = codecs.lookup(name).name.replace("_", "-") not in _NO_CHARSETS
        "".encode(name)  # of those that turn bytes into bytes, e.g. base64, it knows nothing
    except (LookupError, ValueError):
        known = False
    if not known:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"spec.dataset.encoding: {name!r} is no encoding of text that is known here; write "
            "its IANA name, e.g. windows-1252 or shift_jis, or leave it out for UTF-8.",
        )


def find_encoding(content: Content, named: str | None) -> Text:
    """The encoding by its mark, or as named; raises StageError where these contradict."""
    check_encoding(named)
    for bom, encoding in _MARKS:
        if content.start.startswith(bom):
            if named and not _same(named, encoding):
                raise unreadable(
                    content.uri,
                    f"begins with the mark of {encoding.upper()}, but spec.dataset.encoding is "
                    f"{named}: leave it out.",
                )
            return Text(encoding, len(bom))
    if named:
        return Text(named, named=True)
    zeros = tuple(byte == 0 for byte in content.start[:4])
    return Text(_ZEROS.get(zeros, "utf-8"))  # type: ignore[arg-type]


def _same(named: str, encoding: str) -> bool:
    """Whether a name such as UTF-16 stands for an encoding such as utf-16-le."""
    plain = codecs.lookup(named).name.replace("_", "-").removesuffix("-sig")
    return encoding in (plain, f"{plain}-le", f"{plain}-be")


def beginning(content: Content, text: Text) -> str:
    """The first characters from the first one on that is no white space; "" where there is none."""
    with open_text(content, text) as stream:
        while piece := stream.read(CHUNK):
            if found := piece.lstrip():
                return found[:BEGINNING]
    return ""


class LongLineError(Exception):
    """A line is longer than MAX_LINE."""


class _NulError(Exception):
    """A NUL character, which no text has."""


class TextStream:
    """The decoded text, with its line ends as they are."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream

    def read(self, size: int) -> str:
        """Up to `size` characters; "" at the end."""
        text = self._stream.read(size)
        if "\0" in text:
            raise _NulError
        return text

    def lines(self) -> Iterator[str]:
        """Lines with their ends, which may be \\n, \\r\\n or \\r; raises LongLineError."""
        read = self._stream.readline
        while line := read(MAX_LINE + 1):
            if len(line) > MAX_LINE:
                raise LongLineError
            if "\0" in line:
                raise _NulError
            yield line


@contextmanager
def open_text(content: Content, text: Text) -> Iterator[TextStream]:
    """The text behind its mark; reading it raises StageError where it can't be decoded."""
    with content.open() as plain:
        plain.read(text.mark)
        with io.TextIOWrapper(plain, encoding=text.encoding, newline="") as stream:
            try:
                yield TextStream(stream)
            except (UnicodeDecodeError, _NulError) as error:
                raise _explained(content, text) from error


@contextmanager
def open_lines(content: Content, text: Text) -> Iterator[Iterator[str]]:
    """The lines of the text; iterating raises LongLineError, and StageError as open_text."""
    with open_text(content, text) as stream:
        yield stream.lines()


def _explained(content: Content, text: Text) -> StageError:
    """Where the first byte is that can't be read, and what to do; reads from the start again."""
    decoder = codecs.getincrementaldecoder(text.encoding)()
    with content.open() as stream:
        position = len(stream.read(text.mark))
        while chunk := stream.read(CHUNK):
            waiting = len(decoder.getstate()[0])
            try:
                found = decoder.decode(chunk)
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                return _undecodable(content, text, position - waiting + error.start, byte)
            if "\0" in found:
                before = len(found[: found.index("\0")].encode(text.encoding))
                return unreadable(
                    content.uri,
                    f"is no text: byte {position - waiting + before} (0x00) can't be in one. "
                    "Export it as CSV in UTF-8.",
                )
            position += len(chunk)
    rest = decoder.getstate()[0]
    return _undecodable(content, text, position - len(rest), rest[0] if rest else 0, cut=True)


def _undecodable(
    content: Content, text: Text, position: int, byte: int, *, cut: bool = False
) -> StageError:
    found = f"is not {text.encoding.upper()} text: byte {position} (0x{byte:02x}) can't be read"
    if cut:
        found += ", since the file ends within a letter"
    if text.named:
        remedy = "Correct spec.dataset.encoding, or save the file as UTF-8."
    elif cut:
        remedy = "Is it cut off? Upload it again."
    elif text.mark or text.encoding != "utf-8":
        remedy = "Save it as UTF-8."
    else:
        remedy = _guess(content)
    return unreadable(content.uri, f"{found}. {remedy}")


def _guess(content: Content) -> str:
    """What the encoding may be instead of UTF-8, and the remedy."""
    sample = _foreign_lines(content)
    text = sample.decode("utf-8", "replace")
    damaged = text.count("\ufffd")
    if sum(not letter.isascii() for letter in text) > 2 * damaged:
        return "Most of it is UTF-8, so that place is damaged: correct it."
    guesses = [match.encoding for match in from_bytes(sample, cp_isolation=_USUAL)][:GUESSES]
    if _EXCEL not in guesses and "\ufffd" not in sample.decode(_EXCEL, "replace"):
        guesses.append(_EXCEL)
    shown = " or ".join(name.replace("cp125", "windows-125") for name in guesses)
    guess = f"It may be {shown}. " if shown else ""
    return (
        f'{guess}Save it as UTF-8 (Excel: "CSV UTF-8"), or name its encoding in '
        "spec.dataset.encoding."
    )


def _foreign_lines(content: Content) -> bytes:
    """Lines with bytes outside ASCII."""
    sample = bytearray()
    with content.open() as stream:
        while (line := stream.readline(1 << 12)) and len(sample) < SAMPLE:
            if not line.isascii():
                sample += line
    return bytes(sample)
