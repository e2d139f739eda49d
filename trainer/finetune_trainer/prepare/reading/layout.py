"""Which columns (or keys) make up an example."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from finetune_trainer.contract import Columns, Reason, StageError
from finetune_trainer.prepare.reading.record import name_of, names

INSTRUCTION, PROMPT, MESSAGES = "instruction", "prompt-completion", "messages"

_COMPLETE = 1000


@dataclass(frozen=True)
class Layout:
    """One of the three layouts, with the column that holds each part."""

    kind: str
    columns: dict[str, str]


def find_layout(fields: Sequence[str], columns: Columns) -> Layout | None:
    """The layout of a file with these columns; None where it lacks one that is needed."""
    if columns.messages:
        found = columns.messages in fields
        return Layout(MESSAGES, {"messages": columns.messages}) if found else None
    mapped = _mapped(columns)
    if not any(name in fields for name in mapped.values()):
        if "messages" in fields:
            return Layout(MESSAGES, {"messages": "messages"})
        if "prompt" in fields and "completion" in fields:
            return Layout(PROMPT, {"prompt": "prompt", "completion": "completion"})
    if not all(name in fields for name in mapped.values()):
        return None
    if columns.input is None and "input" in fields and "input" not in mapped.values():
        mapped["input"] = "input"
    return Layout(INSTRUCTION, mapped)


def _mapped(columns: Columns) -> dict[str, str]:
    found = {
        "instruction": columns.instruction,
        "input": columns.input,
        "system": columns.system,
        "response": columns.response,
    }
    return {part: name for part, name in found.items() if name is not None}


def default_layout(columns: Columns) -> Layout:
    """The layout of a file without a single readable object: each row says why it is none."""
    if columns.messages:
        return Layout(MESSAGES, {"messages": columns.messages})
    return Layout(INSTRUCTION, _mapped(columns))


def check_columns(columns: Columns) -> None:
    """One column can't be two things; raises StageError (InvalidConfig)."""
    seen: dict[str, str] = {}
    for part, name in _mapped(columns).items():
        if name in seen:
            raise StageError(
                Reason.INVALID_CONFIG,
                f"spec.dataset.columns: {seen[name]} and {part} are both {name!r}; "
                "name two columns.",
            )
        seen[name] = part


def fit(fields: Sequence[str], columns: Columns) -> int:
    """How well a header suits: a whole layout is best, then as many wanted names as possible."""
    complete = _COMPLETE if find_layout(fields, columns) else 0
    wanted = _wanted(columns)
    lowered = {field.strip().lower() for field in fields}
    exact = sum(name in fields for name in wanted)
    return complete + 2 * exact + sum(name.strip().lower() in lowered for name in wanted)


def _wanted(columns: Columns) -> list[str]:
    if columns.messages:
        return [columns.messages]
    return [*_mapped(columns).values(), "messages", "prompt", "completion"]


def missing_column(
    fields: Sequence[str], columns: Columns, uri: str, *, what: str = "column"
) -> StageError:
    """The error for a file that lacks a column, with what it has and a hint."""
    wanted = [columns.messages] if columns.messages else list(_mapped(columns).values())
    name = next(name for name in wanted if name not in fields)
    lowered = {known.strip().lower(): known for known in reversed(fields)}
    close = difflib.get_close_matches(name.strip().lower(), lowered, n=1)
    hint = f" Did you mean {name_of(lowered[close[0]])}?" if close else ""
    if not hint and what == "column":
        hint = " Is its first row the header?"
    return StageError(
        Reason.COLUMN_NOT_FOUND,
        f"{uri} has no {what} {name_of(name)}; it has {names(fields)}.{hint} Map the columns in "
        "spec.dataset.columns, or rename them in the file.",
    )


def check_unique(fields: Sequence[str], layout: Layout, uri: str) -> None:
    """A column that is used must be there once; raises StageError (ColumnNotFound)."""
    for name in layout.columns.values():
        if (count := list(fields).count(name)) > 1:
            raise StageError(
                Reason.COLUMN_NOT_FOUND,
                f"The header of {uri} has the column {name_of(name)} {count} times: rename one.",
            )
