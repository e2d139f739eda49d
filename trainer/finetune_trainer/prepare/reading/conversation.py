"""From the values of a row to a conversation that can be learnt from, or the cause why not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from finetune_trainer.contract import Message
from finetune_trainer.prepare.reading.json_records import NotJsonError, parse
from finetune_trainer.prepare.reading.layout import INSTRUCTION, PROMPT, Layout
from finetune_trainer.prepare.reading.record import clip, name_of, names

Conversation = tuple[Message, ...]

_ROLES = ("system", "user", "assistant")
# Keys of a message that change what it means, so it can't do without them.
_MEANINGFUL = ("tool_calls", "function_call", "weight")
_TYPES = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    bytes: "bytes",
}


class InvalidError(Exception):
    """The row can't be used; the text is the cause."""


Builder = Callable[[Sequence[Any]], Conversation]
"""Takes the values of the layout's columns, in their order; raises InvalidError."""


def builder(layout: Layout, system_prompt: str | None) -> Builder:
    """What makes a conversation of a row; `system_prompt` is for rows without one of their own."""
    fallback = _message("system", system_prompt) if (system_prompt or "").strip() else None
    if layout.kind == INSTRUCTION:
        return _instruction(layout.columns, fallback)
    if layout.kind == PROMPT:
        return _prompt_completion(layout.columns, fallback)
    return _messages(layout.columns["messages"], fallback)


def _instruction(columns: dict[str, str], fallback: Message | None) -> Builder:
    parts = list(columns)
    first, last = parts.index("instruction"), parts.index("response")
    further = parts.index("input") if "input" in parts else None
    own = parts.index("system") if "system" in parts else None
    labels = list(columns.values())

    def build(values: Sequence[Any]) -> Conversation:
        texts = [_text(value, label) for value, label in zip(values, labels, strict=True)]
        blank = [labels[index] for index in (first, last) if not texts[index]]
        if blank:
            raise InvalidError(f"{names(blank)} {'is' if len(blank) == 1 else 'are'} blank")
        asked = texts[first]
        if further is not None and texts[further]:
            asked = f"{asked}\n\n{texts[further]}"
        turns = _message("user", asked), _message("assistant", texts[last])
        if own is not None and texts[own]:
            return _message("system", texts[own]), *turns
        return (fallback, *turns) if fallback else turns

    return build


def _prompt_completion(columns: dict[str, str], fallback: Message | None) -> Builder:
    labels = columns["prompt"], columns["completion"]

    def build(values: Sequence[Any]) -> Conversation:
        sides: list[list[Any]] = []
        for value, label, role in zip(values, labels, ("user", "assistant"), strict=True):
            if isinstance(value, list) and value:
                sides.append(value)
            elif value != [] and (text := _text(value, label)):
                sides.append([_message(role, text)])
            else:
                raise InvalidError(f"{name_of(label)} is blank")
        if sides[1] and isinstance(sides[1][0], dict) and sides[1][0].get("role") != "assistant":
            raise InvalidError(f"{name_of(labels[1])} does not begin with an assistant's message")
        return _checked([*sides[0], *sides[1]], fallback)

    return build


def _messages(label: str, fallback: Message | None) -> Builder:
    def build(values: Sequence[Any]) -> Conversation:
        value = values[0]
        if isinstance(value, str) and value.strip():
            value = _from_json(value, label)
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            raise InvalidError(f"{name_of(label)} is blank")
        if not isinstance(value, list):
            raise InvalidError(f"{name_of(label)} is {_kind(value)}, not a list of messages")
        return _checked(value, fallback)

    return build


def _from_json(text: str, label: str) -> Any:
    try:
        return parse(text)
    except NotJsonError as error:
        hint = " (JSON has double quotes; is it Python's own notation?)" if "'" in text[:9] else ""
        raise InvalidError(f"{name_of(label)} is no JSON: {error}{hint}") from error


def _checked(items: list[Any], fallback: Message | None) -> Conversation:
    """Messages in turn, the assistant last; raises InvalidError."""
    messages = [_read(item, place) for place, item in enumerate(items, start=1)]
    if messages[0]["role"] == "system" and not messages[0]["content"]:
        del messages[0]
    own = bool(messages) and messages[0]["role"] == "system"
    for place, message in enumerate(messages[own:], start=1 + own):
        role, expected = message["role"], ("user", "assistant")[(place - own - 1) % 2]
        if role != expected:
            raise InvalidError(f"message {place} is the {role}'s where the {expected}'s is due")
        if not message["content"]:
            raise InvalidError(f"message {place} ({role}) is blank")
    if not messages or messages[-1]["role"] != "assistant":
        raise InvalidError("the last message is not the assistant's")
    return tuple(messages) if own or not fallback else (fallback, *messages)


def _read(item: Any, place: int) -> Message:
    if not isinstance(item, dict):
        raise InvalidError(f"message {place} is {_kind(item)}, not an object with role and content")
    if missing := [key for key in ("role", "content") if key not in item]:
        has = f"; it has {names(item)}" if item else ""
        raise InvalidError(f"message {place} has no {names(missing)}{has}")
    role = item["role"]
    if role not in _ROLES:
        raise InvalidError(
            f"message {place} has the role {clip(repr(role), 40)}, not system, user or assistant"
        )
    for key in _MEANINGFUL:
        if item.get(key) not in (None, [], {}):
            raise InvalidError(f"message {place} has {key!r}, which can't be learnt from here")
    return _message(role, _text(item["content"], "content", f"message {place}: "))


def _text(value: Any, label: str, where: str = "") -> str:
    """The value as it is, or "" where it is blank; what is no text raises InvalidError."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidError(f"{where}{name_of(label)} is {_kind(value)}, not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidError(f"{where}{name_of(label)} has half a surrogate pair") from None
    if "\0" in value:
        raise InvalidError(f"{where}{name_of(label)} has a NUL character")
    return value if value.strip() else ""


def _kind(value: object) -> str:
    if value is None:
        return "null"
    return _TYPES.get(type(value), "text" if isinstance(value, str) else type(value).__name__)


def _message(role: str, content: str | None) -> Message:
    return {"role": role, "content": content or ""}
