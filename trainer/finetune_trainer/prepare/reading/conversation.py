"""The messages of a row: each checked, and what they make together."""

from __future__ import annotations

from typing import Any

from finetune_trainer.contract import Message
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
    """The row can't be used; the text says why."""


def checked(items: list[Any], fallback: Message | None) -> Conversation:
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
        raise InvalidError(
            f"message {place} is {kind_of(item)}, not an object with role and content"
        )
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
    return message_of(role, text_of(item["content"], "content", f"message {place}: "))


def text_of(value: Any, label: str, where: str = "") -> str:
    """The value as it is, or "" where it is blank; what is no text raises InvalidError."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidError(f"{where}{name_of(label)} is {kind_of(value)}, not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidError(f"{where}{name_of(label)} has half a surrogate pair") from None
    if "\0" in value:
        raise InvalidError(f"{where}{name_of(label)} has a NUL character")
    return value if value.strip() else ""


def kind_of(value: object) -> str:
    if value is None:
        return "null"
    return _TYPES.get(type(value), "text" if isinstance(value, str) else type(value).__name__)


def message_of(role: str, content: str | None) -> Message:
    return {"role": role, "content": content or ""}
