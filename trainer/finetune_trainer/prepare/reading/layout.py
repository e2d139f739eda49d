"""Which columns (or JSON keys) make up an example, and the messages that a row becomes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_trainer.contract import Columns, Message, Reason, StageError, Tool
from finetune_trainer.prepare.reading.conversation import (
    Conversation,
    InvalidError,
    checked,
    from_json,
    kind_of,
    message_of,
    text_of,
    tools_of,
)
from finetune_trainer.prepare.reading.record import name_of, names

INSTRUCTION, PROMPT, MESSAGES = "instruction", "prompt-completion", "messages"

_FORMER_TOOLS = "functions"
_BESIDE = ("tools", _FORMER_TOOLS)  # what may stand beside a conversation; last in a layout

_WHOLE_LAYOUT = 1000  # outweighs any number of single names


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
    complete = _WHOLE_LAYOUT if find_layout(fields, columns) else 0
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


def with_tools(
    layout: Layout, fields: Sequence[str], columns: Columns, uri: str, *, what: str
) -> Layout:
    """The layout with what stands beside a conversation; raises StageError (ColumnNotFound)."""
    if columns.tools is not None and columns.tools not in fields:
        raise StageError(
            Reason.COLUMN_NOT_FOUND,
            f"{uri} has no {what} {name_of(columns.tools)}; it has {names(fields)}. Correct "
            "spec.dataset.columns.tools, or leave it out.",
        )
    beside = {"tools": columns.tools} if columns.tools is not None else {}
    if layout.kind != INSTRUCTION:
        beside = {"tools": columns.tools or "tools", _FORMER_TOOLS: _FORMER_TOOLS}
    used = layout.columns.values()
    found = {part: name for part, name in beside.items() if name in fields and name not in used}
    return Layout(layout.kind, layout.columns | found)


Builder = Callable[[Sequence[Any]], Conversation]
"""Takes the values of the layout's columns, in their order; raises InvalidError."""

RowBuilder = Callable[[Sequence[Any]], tuple[Conversation, list[Tool]]]
"""The same, and the tools that stand beside the conversation."""


def builder(layout: Layout, system_prompt: str | None, ignored: set[str]) -> RowBuilder:
    """Makes conversations of rows; `system_prompt` is for rows without one of their own.

    `ignored` gets the keys of messages that nothing is taken from.
    """
    beside = {part: name for part, name in layout.columns.items() if part in _BESIDE}
    own = {part: name for part, name in layout.columns.items() if part not in _BESIDE}
    build = _builder(Layout(layout.kind, own), system_prompt, ignored)

    def build_row(values: Sequence[Any]) -> tuple[Conversation, list[Tool]]:
        tools: list[Tool] = []
        for (part, name), value in zip(beside.items(), values[len(own) :], strict=True):
            if part != _FORMER_TOOLS:
                tools = tools_of(value, name)
            elif value not in (None, "", []):
                raise InvalidError(
                    f"it has {name_of(name)}, OpenAI's former notation: convert them to tools"
                )
        return build(values[: len(own)]), tools

    return build_row


def _builder(layout: Layout, system_prompt: str | None, ignored: set[str]) -> Builder:
    fallback = message_of("system", system_prompt) if (system_prompt or "").strip() else None
    if layout.kind == INSTRUCTION:
        return _instruction(layout.columns, fallback)
    if layout.kind == PROMPT:
        return _prompt_completion(layout.columns, fallback, ignored)
    return _messages(layout.columns["messages"], fallback, ignored)


def _instruction(columns: dict[str, str], fallback: Message | None) -> Builder:
    parts = list(columns)
    first, last = parts.index("instruction"), parts.index("response")
    further = parts.index("input") if "input" in parts else None
    own = parts.index("system") if "system" in parts else None
    labels = list(columns.values())

    def build(values: Sequence[Any]) -> Conversation:
        texts = [text_of(value, label) for value, label in zip(values, labels, strict=True)]
        blank = [labels[index] for index in (first, last) if not texts[index]]
        if blank:
            raise InvalidError(f"{names(blank)} {'is' if len(blank) == 1 else 'are'} blank")
        asked = texts[first]
        if further is not None and texts[further]:
            asked = f"{asked}\n\n{texts[further]}"
        turns = message_of("user", asked), message_of("assistant", texts[last])
        if own is not None and texts[own]:
            return message_of("system", texts[own]), *turns
        return (fallback, *turns) if fallback else turns

    return build


def _prompt_completion(
    columns: dict[str, str], fallback: Message | None, ignored: set[str]
) -> Builder:
    labels = columns["prompt"], columns["completion"]

    def build(values: Sequence[Any]) -> Conversation:
        sides: list[list[Any]] = []
        for value, label, role in zip(values, labels, ("user", "assistant"), strict=True):
            if isinstance(value, list) and value:
                sides.append(value)
            elif value != [] and (text := text_of(value, label)):
                sides.append([message_of(role, text)])
            else:
                raise InvalidError(f"{name_of(label)} is blank")
        if sides[1] and isinstance(sides[1][0], dict) and sides[1][0].get("role") != "assistant":
            raise InvalidError(f"{name_of(labels[1])} does not begin with an assistant's message")
        return checked([*sides[0], *sides[1]], fallback, ignored)

    return build


def _messages(label: str, fallback: Message | None, ignored: set[str]) -> Builder:
    def build(values: Sequence[Any]) -> Conversation:
        value = values[0]
        if isinstance(value, str) and value.strip():
            value = from_json(value, label)
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            raise InvalidError(f"{name_of(label)} is blank")
        if not isinstance(value, list):
            raise InvalidError(f"{name_of(label)} is {kind_of(value)}, not a list of messages")
        return checked(value, fallback, ignored)

    return build
