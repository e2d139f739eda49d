"""What is printed: tables that fit the terminal, JSON, YAML or names; notes go to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

ENDLESS = 100_000  # columns of a pipe or file: nothing is cut there


class Form(StrEnum):
    """-o of kubectl."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"
    NAME = "name"


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    title: str
    needed: int = 0
    """How badly it is needed on a narrow terminal: the lowest goes first, 9 stays."""

    right: bool = False


def console() -> Console:
    """Standard output; as wide as the terminal, and in colour unless NO_COLOR is set."""
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else ENDLESS
    return Console(width=width, highlight=False, soft_wrap=width is not None)


def show_table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; columns that don't fit are left out, the least needed first."""
    out, cells = console(), [list(row) for row in rows]
    kept = list(range(len(columns)))
    while True:
        table = _table([columns[n] for n in kept], [[row[n] for n in kept] for row in cells])
        room = out.options.update(width=ENDLESS, max_width=ENDLESS)
        least = min(kept, key=lambda n: (columns[n].needed, -n))
        if Measurement.get(out, room, table).maximum <= out.width or columns[least].needed >= 9:
            break
        kept.remove(least)
    out.print(table)


def _table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="none")
    for column in columns:
        justify = "right" if column.right else "left"
        table.add_column(column.title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*map(_plain, row))
    return table


def _plain(text: str) -> str:
    """Text that rich takes as it is."""
    return text.replace("[", r"\[") if "[" in text else text


def show_object(found: Any, form: Form) -> None:
    """Print JSON or YAML."""
    if form is Form.YAML:
        import yaml

        typer.echo(yaml.safe_dump(found, sort_keys=False, allow_unicode=True), nl=False)
    else:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))


def note(text: str) -> None:
    """Say something that is not the result."""
    typer.echo(text, err=True)


def bytes_in_words(count: int) -> str:
    """A size for people, e.g. 1.4 GB."""
    from rich.filesize import decimal

    return decimal(count)


def age(text: str | None, now: datetime | None = None) -> str:
    """How long ago a time of Kubernetes was, e.g. 4m or 3d; empty where it isn't known."""
    try:
        then = datetime.fromisoformat(text or "")
    except ValueError:
        return ""
    seconds = max(0, int(((now or datetime.now(UTC)) - then).total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length or (unit == "d" and seconds >= length):
            return f"{seconds // length}{unit}"
    return f"{seconds}s"
