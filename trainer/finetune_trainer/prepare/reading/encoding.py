"""A file as text: its encoding, found in one pass over the whole file, and its lines.

UTF-8 is taken for granted until a byte contradicts it. Then the text has to look like a Western
language in Latin-1 or Windows-1252; what looks like anything else is refused.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from charset_normalizer import from_bytes

from finetune_trainer.prepare.reading.content import CHUNK, Content, unreadable

MAX_LINE = 16 << 20  # characters: more than any model's context holds

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
_SINGLE = re.compile("(?:^|[\r\n,;\t|])'")
_SPACED = re.compile('[,;\t|] "')

SAMPLE = 1 << 18  # bytes of lines with letters outside ASCII
GUESSED = 1 << 14  # bytes of them that charset-normalizer looks at

_HIGH = re.compile(rb"[\x80-\xff]")
_LINES = re.compile(rb"[^\r\n]*[\x80-\xff][^\r\n]*")
_C1 = bytes(range(0x80, 0xA0))
_UNDEFINED = re.compile(rb"[\x81\x8d\x8f\x90\x9d]")
_UTF8 = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
_CUT = re.compile(rb"([\xc2-\xf4]|[\xe0-\xf4][\x80-\xbf]|[\xf0-\xf4][\x80-\xbf]{2})\Z")

_LETTERS = "À-ÖØ-öø-ÿŠšŽžŒœŸ"
# Signs that do stand inside a word: apostrophe, dashes, dots, accent, soft hyphen, hard space.
_JOINTS = "\u2019\u2013\u2014\u2026\xb7\xb4\xad\xa0"
_RUN = re.compile(f"[{_LETTERS}]{{3,}}")
_INSIDE = re.compile(f"(?<=[A-Za-z{_LETTERS}])[^\x00-\x7f{_LETTERS}{_JOINTS}](?=[a-zß-öø-ÿ])")
# Other encodings that use the same bytes. In Portuguese õ stands before e; Hungarian has ő for it,
# beside accents that Estonian does not know. ISO-8859-15 has the euro and œ for ¤ and ½.
_HUNGARIAN = re.compile("[õÕ](?![eE])")
_ACCENTS = re.compile("[áíóúÁÍÓÚ]")
_LATIN_9 = re.compile(f"\xa4|[\xa6\xa8\xb8\xbc-\xbe](?=[A-Za-z{_LETTERS}])")
# Signs that don't stand behind an accented letter: macron, not, broken bar, diaeresis, currency,
# cedilla, circumflex, tilde, the Spanish openings, florin, cent, yen, per mille, double dagger.
_SIGNS = "\xaf\xac\xa6\xa8\xa4\xb8\u02c6\u02dc\xa1\xbf\u0192\xa2\xa5\u2030\u2021"
_BEHIND = re.compile(f"[{_LETTERS}][{_SIGNS}]")

# Languages that are written in these encodings, as charset-normalizer names them.
_LANGUAGES = {
    "Danish", "Dutch", "English", "Finnish", "French", "German", "Indonesian", "Italian",
    "Norwegian", "Portuguese", "Spanish", "Swedish", "Unknown",
}  # fmt: skip

_SURE = 0.1  # coherence from which charset-normalizer's language is taken for granted


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
        encoding, doubt = _western_encoding(content)
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


@dataclass(frozen=True)
class _HighBytes:
    """What is outside ASCII in the file."""

    sample: bytes
    """Lines with such bytes."""

    windows: bool
    """Whether bytes from 0x80 to 0x9f occur, which Latin-1 has no letters for."""

    undefined: int | None
    """Position of the first byte that Windows-1252 does not have."""

    cut: bool
    """Whether the file ends within what would be a letter of UTF-8."""


def _western_encoding(content: Content) -> tuple[str | None, str]:
    """The encoding, or None and why it is none of these."""
    seen = _sample_high_bytes(content)
    if doubt := _doubt(seen):
        return None, doubt
    return ("cp1252" if seen.windows else "iso-8859-1"), ""


def _sample_high_bytes(content: Content) -> _HighBytes:
    sample = bytearray()
    windows, undefined, position, end = False, None, 0, b""
    with content.open() as stream:
        while chunk := stream.read(CHUNK):
            windows = windows or len(chunk.translate(None, _C1)) < len(chunk)
            if undefined is None and (gap := _UNDEFINED.search(chunk)):
                undefined = position + gap.start()
            if len(sample) < SAMPLE:
                sample += b"\n".join(_LINES.findall(chunk))[:SAMPLE] + b"\n"
            position += len(chunk)
            end = (end + chunk)[-3:]
    return _HighBytes(bytes(sample), windows, undefined, bool(_CUT.search(end)))


def _doubt(seen: _HighBytes) -> str | None:
    """Why the text is not Western, if it is not."""
    high = len(_HIGH.findall(seen.sample))
    utf8 = sum(len(found) for found in _UTF8.findall(seen.sample))
    if utf8 * 2 >= high or (seen.cut and high - utf8 <= 3):
        return "The rest of it is UTF-8, so that place is damaged."
    if seen.undefined is not None:
        return f"Nor is it Windows-1252 (byte {seen.undefined})."
    text = seen.sample.decode("cp1252", "replace")
    odd = sum(len(run) for run in _RUN.findall(text))
    odd += len(_INSIDE.findall(text)) + 2 * len(_BEHIND.findall(text))
    if odd * 10 > high:
        return "Nor does it look like Latin-1 or Windows-1252."
    if utf8 * 20 > high:
        return "It mixes encodings."
    return _other_language(seen.sample[:GUESSED]) or _other_letters(text)


def _other_language(sample: bytes) -> str | None:
    best = from_bytes(sample).best()
    if best is None or best.language in _LANGUAGES or best.coherence < _SURE:
        return None
    if str(best) == sample.decode("cp1252", "replace"):
        return None
    return f"It looks like {best.encoding} ({best.language})."


def _other_letters(text: str) -> str | None:
    if _HUNGARIAN.search(text) and _ACCENTS.search(text):
        return "It looks like ISO-8859-2 or Windows-1250 (Hungarian)."
    return "It looks like ISO-8859-15." if _LATIN_9.search(text) else None
