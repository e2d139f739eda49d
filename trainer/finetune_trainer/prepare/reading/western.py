"""Text that is not UTF-8: is it Latin-1 or Windows-1252, the encodings of old Western files?

All bytes mean something in them, so the question is whether what they mean looks like words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from charset_normalizer import from_bytes

from finetune_trainer.prepare.reading.content import CHUNK, Content

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
class _Seen:
    """What is outside ASCII in the file."""

    sample: bytes
    """Lines with such bytes."""

    windows: bool
    """Whether bytes from 0x80 to 0x9f occur, which Latin-1 has no letters for."""

    undefined: int | None
    """Position of the first byte that Windows-1252 does not have."""

    cut: bool
    """Whether the file ends within what would be a letter of UTF-8."""


def western_encoding(content: Content) -> tuple[str | None, str]:
    """The encoding, or None and why it is none of these."""
    seen = _look(content)
    if doubt := _doubt(seen):
        return None, doubt
    return ("cp1252" if seen.windows else "iso-8859-1"), ""


def _look(content: Content) -> _Seen:
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
    return _Seen(bytes(sample), windows, undefined, bool(_CUT.search(end)))


def _doubt(seen: _Seen) -> str | None:
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
