"""How names, counts and values of a file appear in a message: short, on one line."""

from __future__ import annotations

from collections.abc import Iterable

SHOWN = 10  # problems and column names that a message lists
LONGEST = 200  # characters of a cause


def clip(text: str, limit: int = LONGEST) -> str:
    """The text on one line, cut where it would fill the message alone."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def printable(name: str) -> str:
    """A column's name for a report: short, and without halves of surrogate pairs."""
    return clip(name.encode("utf-8", "backslashreplace").decode())


def name_of(name: str) -> str:
    """A column as the message quotes it."""
    return clip(repr(name), 60)


def names(of: Iterable[str]) -> str:
    """The first columns, and how many more there are."""
    every = list(of)
    shown = ", ".join(name_of(name) for name in every[:SHOWN])
    return f"{shown} and {len(every) - SHOWN} more" if len(every) > SHOWN else shown


def plural(count: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
