"""The messages that a row becomes: a conversation, a pair of answers, an answer with its label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from finetune_trainer.contract import DOCUMENT, Message, Tool
from finetune_trainer.prepare.reading.conversation import (
    Conversation,
    InvalidError,
    cell_of,
    checked,
    from_json,
    kind_of,
    message_of,
    text_of,
    tools_of,
)
from finetune_trainer.prepare.reading.layout import (
    BESIDE,
    FORMER_TOOLS,
    INSTRUCTION,
    LABEL,
    OPENAI_PAIR,
    PAIR,
    PROMPT,
    TEXT,
    Layout,
)
from finetune_trainer.prepare.reading.record import RowContents, clip, name_of, names

_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's
_LABELS = {"true": True, "1": True, "false": False, "0": False}

Builder = Callable[[Sequence[Any]], Conversation]
"""Takes the values of the layout's columns, in their order; raises InvalidError."""

RowBuilder = Callable[[Sequence[Any]], RowContents]
"""The same for all of a row, with what stands beside the conversation."""


def builder(layout: Layout, system_prompt: str | None, ignored: set[str]) -> RowBuilder:
    """Makes conversations of rows; `system_prompt` is for rows without one of their own.

    `ignored` gets the keys of messages that nothing is taken from.
    """
    label = layout.columns.get(LABEL)
    own = {part: n for part, n in layout.columns.items() if part not in (*BESIDE, LABEL)}
    beside = {part: name for part, name in layout.columns.items() if part in BESIDE}
    fallback = message_of("system", system_prompt) if (system_prompt or "").strip() else None
    build = _row_builder(layout.kind, own, fallback, ignored)
    if not beside and label is None:
        return build
    order = list(layout.columns)

    def build_row(values: Sequence[Any]) -> RowContents:
        row = dict(zip(order, values, strict=True))
        built = build([row[part] for part in own])
        if beside:
            built = built._replace(tools=_tools_of_row(beside, row) or built.tools)
        return built if label is None else built._replace(label=_label(row[LABEL], label))

    return build_row


def _row_builder(
    kind: str, columns: dict[str, str], fallback: Message | None, ignored: set[str]
) -> RowBuilder:
    if kind == PAIR:
        return _pair(columns, fallback, ignored)
    if kind == TEXT:
        build = _document(columns[TEXT])
    elif kind == INSTRUCTION:
        build = _instruction(columns, fallback)
    else:
        build = _conversation(kind, columns, fallback, ignored)
    return lambda values: RowContents(build(values))


def _label(value: Any, column: str) -> bool:
    """Whether an answer is a good one; raises InvalidError."""
    text = cell_of(value, column) if not isinstance(value, str) else value
    label = _LABELS.get(text.strip().casefold())
    if label is None:
        was = f"is {clip(repr(text), 40)}, not true or false" if text.strip() else "is blank"
        raise InvalidError(
            f"{name_of(column)} {was}: write true for an answer to learn, false for one to avoid"
        )
    return label


def _tools_of_row(columns: dict[str, str], row: dict[str, Any]) -> Sequence[Tool]:
    """What stands beside a conversation; raises InvalidError."""
    tools: Sequence[Tool] = ()
    for part, name in columns.items():
        if part != FORMER_TOOLS:
            tools = tools_of(row[part], name)
        elif row[part] not in (None, "", []):
            raise InvalidError(
                f"it has {name_of(name)}, OpenAI's former notation: convert them to tools"
            )
    return tools


def _conversation(
    kind: str, columns: dict[str, str], fallback: Message | None, ignored: set[str]
) -> Builder:
    turns = _prompt_completion if kind == PROMPT else _messages
    parts = list(columns)

    def build(values: Sequence[Any]) -> Conversation:
        row = dict(zip(parts, values, strict=True))
        items = turns(columns, row)
        if "system" in row and (text := cell_of(row["system"], columns["system"])):
            return checked(items, message_of("system", text), ignored)
        return checked(items, fallback, ignored)

    return build


def _document(column: str) -> Builder:
    """Plain text as it is, white space included."""

    def build(values: Sequence[Any]) -> Conversation:
        (value,) = values
        text = text_of(value, column) if isinstance(value, str) else cell_of(value, column)
        if not text:
            raise InvalidError(f"{name_of(column)} is blank")
        return (message_of(DOCUMENT, text),)

    return build


def _instruction(columns: dict[str, str], fallback: Message | None) -> Builder:
    parts = list(columns)
    first, last = parts.index("instruction"), parts.index("response")
    further = parts.index("input") if "input" in parts else None
    own = parts.index("system") if "system" in parts else None
    labels = list(columns.values())

    def build(values: Sequence[Any]) -> Conversation:
        texts = [
            text_of(value, label) if isinstance(value, str) else cell_of(value, label)
            for value, label in zip(values, labels, strict=True)
        ]
        if not texts[first] or not texts[last]:
            blank = [labels[index] for index in (first, last) if not texts[index]]
            raise InvalidError(f"{names(blank)} {'is' if len(blank) == 1 else 'are'} blank")
        asked = texts[first]
        if further is not None and texts[further]:
            asked = f"{asked}\n\n{texts[further]}"
        turns = message_of("user", asked), message_of("assistant", texts[last])
        if own is not None and texts[own]:
            return message_of("system", texts[own]), *turns
        return (fallback, *turns) if fallback else turns

    return build


def _prompt_completion(columns: dict[str, str], row: dict[str, Any]) -> list[Any]:
    sides: list[list[Any]] = []
    for part, role in (("prompt", "user"), ("completion", "assistant")):
        value, label = row[part], columns[part]
        if isinstance(value, list) and value:
            sides.append([_usual(item) for item in value])
        elif value != [] and (text := cell_of(value, label)):
            sides.append([message_of(role, text)])
        else:
            raise InvalidError(f"{name_of(label)} is blank")
    first = sides[1][0]
    if isinstance(first, dict) and first.get("role") != "assistant":
        raise InvalidError(
            f"{name_of(columns['completion'])} does not begin with an assistant's message"
        )
    return [*sides[0], *sides[1]]


def _messages(columns: dict[str, str], row: dict[str, Any]) -> list[Any]:
    value, label = row["messages"], columns["messages"]
    if isinstance(value, str) and value.strip():
        value = from_json(value, label)
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        raise InvalidError(f"{name_of(label)} is blank")
    if not isinstance(value, list):
        raise InvalidError(f"{name_of(label)} is {kind_of(value)}, not a list of messages")
    if isinstance(value[0], dict) and "role" in value[0]:
        return value
    return [_usual(item) for item in value]


def _usual(item: Any) -> Any:
    """ShareGPT's `from` and `value` as role and content; anything else as it is."""
    if not isinstance(item, dict) or "from" not in item or "role" in item:
        return item
    found = {key: value for key, value in item.items() if key not in ("from", "value")}
    speaker = item["from"]
    found["role"] = _ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
    if "value" in item:
        found["content"] = item["value"]
    return found


# --- Pairs ---------------------------------------------------------------------------------------


def _pair(columns: dict[str, str], fallback: Message | None, ignored: set[str]) -> RowBuilder:
    parts = list(columns)
    chosen, rejected = columns["chosen"], columns["rejected"]

    def build(values: Sequence[Any]) -> RowContents:
        row = dict(zip(parts, values, strict=True))
        first = fallback
        if "system" in row and (text := cell_of(row["system"], columns["system"])):
            first = message_of("system", text)
        prompt, tools = _prompt_of_pair(columns, row)
        better = checked(_side(row["chosen"], chosen, prompt), first, ignored)
        worse = checked(_side(row["rejected"], rejected, prompt), first, ignored)
        if better[:-1] != worse[:-1]:
            raise InvalidError(
                f"{names((chosen, rejected))} are two conversations that differ before the last "
                "answer: both have to answer the same"
            )
        if better[-1] == worse[-1]:
            raise InvalidError(
                f"{names((chosen, rejected))} say the same, so that neither is preferred: correct "
                "one of them, or take the row out"
            )
        if "weight" in better[-1] or "weight" in worse[-1]:
            raise InvalidError("an answer of the pair has weight 0, and both of them are learnt")
        return RowContents(better, tools, worse[-1])

    return build


def _prompt_of_pair(
    columns: dict[str, str], row: dict[str, Any]
) -> tuple[list[Any], Sequence[Tool]]:
    """What comes before both answers, with its tools where it brings some (OpenAI's `input`)."""
    if "prompt" not in row:
        return [], ()
    value, label = row["prompt"], columns["prompt"]
    tools: Sequence[Tool] = ()
    if label == OPENAI_PAIR["prompt"]:
        if isinstance(value, str) and value.lstrip().startswith("{"):
            value = from_json(value, label)
        if isinstance(value, dict):
            tools = tools_of(value.get("tools"), f"{label}.tools")
            value, label = value.get("messages"), f"{label}.messages"
    if isinstance(value, list) and value:
        return [_usual(item) for item in value], tools
    if value == [] or not (text := cell_of(value, label)):
        raise InvalidError(f"{name_of(label)} is blank")
    if "input" in row and (further := cell_of(row["input"], columns["input"])):
        text = f"{text}\n\n{further}"
    return [message_of("user", text)], tools


def _side(value: Any, label: str, prompt: list[Any]) -> list[Any]:
    """The conversation that ends with one of the two answers; raises InvalidError."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        text = cell_of(value, label)
        if not text:
            raise InvalidError(f"{name_of(label)} is blank")
        if not prompt:
            raise InvalidError(
                f"{name_of(label)} is text, and there is no column with what it answers: add a "
                "column prompt, or write whole conversations as lists of messages"
            )
        return [*prompt, message_of("assistant", text)]
    items = [_usual(item) for item in value]
    if not items:
        raise InvalidError(f"{name_of(label)} is blank")
    if _role_of(items[0]) == "assistant" and prompt:
        if len(items) > 1:
            raise InvalidError(
                f"{name_of(label)} has {len(items)} messages: a preference is between two single "
                "answers, so move all but the last one to the prompt"
            )
        return [*prompt, *items]
    said = [item.get("content") for item in items[:-1] if isinstance(item, dict)]
    asked = prompt[-1].get("content") if prompt and isinstance(prompt[-1], dict) else None
    if prompt and asked not in said:
        raise InvalidError(f"{name_of(label)} is a conversation without what the prompt says")
    return items


def _role_of(item: Any) -> Any:
    return item.get("role") if isinstance(item, dict) else None
