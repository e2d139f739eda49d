"""The messages of a row: each checked, and what they make together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from finetune_trainer.contract import Message, Tool, ToolCall
from finetune_trainer.prepare.reading.json_records import NotJsonError, parse
from finetune_trainer.prepare.reading.record import clip, name_of, names

Conversation = tuple[Message, ...]

_ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's name for it since its o1 models
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
"""What servers call it: vLLM and DeepSeek, OpenRouter, Ollama and gpt-oss."""

_READ = {"role", "content", "tool_calls", "tool_call_id", "name", "weight", *_REASONING}
# Keys that are something to learn, so a message can't do without them; and what to do.
_REFUSED = {
    "function_call": "OpenAI's former notation: convert it to tool_calls",
    "audio": "which can't be learnt from: only text can",
    "refusal": "which no chat template knows: move it to content",
}
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


def checked(items: list[Any], fallback: Message | None, ignored: set[str]) -> Conversation:
    """Messages that end with an answer; raises InvalidError.

    `ignored` gets the keys of messages that nothing is taken from. Whether the model's chat
    template takes the turns in this order shows later, when it is applied.
    """
    read = [(place, _read(item, place, ignored)) for place, item in enumerate(items, start=1)]
    if read[0][1]["role"] == "system" and not read[0][1]["content"]:
        del read[0]
    messages = [message for _, message in read]
    if not messages or messages[-1]["role"] != "assistant":
        raise InvalidError("the last message is not the assistant's, so nothing follows to learn")
    for place, message in read:
        may_be_blank = message["role"] == "tool" or "tool_calls" in message
        if not message["content"] and not may_be_blank:
            raise InvalidError(f"message {place} ({message['role']}) is blank")
    if len(messages) == 1:
        raise InvalidError("it has an assistant's message alone: nothing asks for the answer")
    if any(message["role"] == "tool" for message in messages):
        _check_tools(read)
        messages = _in_the_order_of_calls(messages)
    if not any(is_learnt(message) for message in messages):
        raise InvalidError("every assistant's message has weight 0, so nothing is left to learn")
    own = messages[0]["role"] == "system"
    return tuple(messages) if own or not fallback else (fallback, *messages)


def is_learnt(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def _check_tools(read: Iterable[tuple[int, Message]]) -> None:
    """A tool's message answers one of the calls before it; raises InvalidError."""
    called: set[str | None] = set()
    for place, message in read:
        if message["role"] != "tool":
            called = {call.get("id") for call in message.get("tool_calls", [])}
            continue
        if not called:
            raise InvalidError(f"message {place} is a tool's, and no tool_calls stand before it")
        answered = message.get("tool_call_id")
        if answered is not None and None not in called and answered not in called:
            raise InvalidError(
                f"message {place} has the tool_call_id {name_of(answered)}, which is none of the "
                "calls before it"
            )


def _in_the_order_of_calls(messages: list[Message]) -> list[Message]:
    """Each call's answer in its place: templates that leave out tool_call_id tell them by that."""
    turn, calls, keys = 0, dict[str | None, int](), []
    for message in messages:
        if message["role"] == "tool":
            keys.append((turn, calls.get(message.get("tool_call_id"), len(calls))))
            continue
        turn += 1
        calls = {call.get("id"): n for n, call in enumerate(message.get("tool_calls", []))}
        keys.append((turn, -1))
    return [messages[n] for n in sorted(range(len(messages)), key=keys.__getitem__)]


def _read(item: Any, place: int, ignored: set[str]) -> Message:
    if not isinstance(item, dict):
        raise InvalidError(
            f"message {place} is {kind_of(item)}, not an object with role and content"
        )
    calls = item.get("tool_calls")
    needed = ("role",) if calls else ("role", "content")
    if missing := [key for key in needed if key not in item]:
        has = f"; it has {names(item)}" if item else ""
        raise InvalidError(f"message {place} has no {names(missing)}{has}")
    role = _role(item["role"], place)
    message = message_of(role, _content(item.get("content"), place))
    if len(item) > len(message):
        _read_further(item, message, place, ignored)
    return message


def _role(given: Any, place: int) -> str:
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        hint = "; convert it to the role tool, after tool_calls" if given == "function" else ""
        raise InvalidError(
            f"message {place} has the role {clip(repr(given), 40)}, not system (or developer), "
            f"user, assistant or tool{hint}"
        )
    return role


def _content(value: Any, place: int) -> str:
    """The text, of which OpenAI's API takes several parts as well."""
    where = f"message {place}: "
    if not isinstance(value, list):
        return text_of(value, "content", where)
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind != "text":
            what = (
                f"a part of type {clip(repr(kind), 40)}" if kind else f"{kind_of(part)} as a part"
            )
            raise InvalidError(f"{where}'content' has {what}: only text can be learnt from")
        if isinstance(text := part.get("text"), str):
            text_of(text, "text", where)
            texts.append(text)
        else:
            raise InvalidError(f"{where}'text' of a part is {kind_of(text)}, not text")
    return text_of("".join(texts), "content", where)


def _read_further(item: Mapping[str, Any], message: Message, place: int, ignored: set[str]) -> None:
    """Take what a message has beside role and content."""
    where, role = f"message {place}: ", message["role"]
    for key, why in _REFUSED.items():
        if item.get(key) not in (None, "", [], {}):
            raise InvalidError(f"message {place} has {key!r}, {why}")
    _read_texts(item, message, place)
    if calls := item.get("tool_calls"):
        _only("assistant", role, "tool_calls", place)
        message["tool_calls"] = _tool_calls(calls, where)
    if (weight := item.get("weight")) is not None:
        _only("assistant", role, "weight", place)
        if isinstance(weight, bool) or weight not in (0, 1):
            raise InvalidError(f"{where}'weight' is {clip(repr(weight), 40)}, not 0 or 1")
        if weight == 0:
            message["weight"] = 0
    ignored.update(
        key
        for key, value in item.items()
        if key not in _READ and key not in _REFUSED and value not in (None, "", [], {})
    )


def _read_texts(item: Mapping[str, Any], message: Message, place: int) -> None:
    where, role = f"message {place}: ", message["role"]
    for key in _REASONING:
        if (reasoning := text_of(item.get(key), key, where)) and "reasoning_content" not in message:
            _only("assistant", role, key, place)
            message["reasoning_content"] = reasoning
    if call := text_of(item.get("tool_call_id"), "tool_call_id", where):
        _only("tool", role, "tool_call_id", place)
        message["tool_call_id"] = call
    if name := text_of(item.get("name"), "name", where):
        message["name"] = name


def tools_of(value: Any, label: str) -> list[Tool]:
    """The tools of a row: a list of definitions, or that as JSON text; raises InvalidError."""
    if isinstance(value, str) and value.strip():
        value = from_json(value, label)
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return []
    if not isinstance(value, list):
        raise InvalidError(f"{name_of(label)} is {kind_of(value)}, not a list of tools")
    return [_tool(item, f"{label}[{index}]") for index, item in enumerate(value)]


def _tool(item: Any, where: str) -> Tool:
    function = _function(item, where)
    check_json(item, where)
    if function is item:  # as OpenAI's newer API has it, without a level of its own
        return {"type": "function", "function": {k: v for k, v in item.items() if k != "type"}}
    return {"type": "function", **{k: v for k, v in item.items() if v is not None}}


def _tool_calls(value: Any, where: str) -> list[ToolCall]:
    if not isinstance(value, list):
        raise InvalidError(f"{where}'tool_calls' is {kind_of(value)}, not a list of calls")
    return [_tool_call(item, f"{where}tool_calls[{index}]") for index, item in enumerate(value)]


def _tool_call(item: Any, where: str) -> ToolCall:
    function = _function(item, where)
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = from_json(arguments, "arguments", f"{where}: ")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    if not isinstance(arguments, dict):
        raise InvalidError(f"{where}: 'arguments' is {kind_of(arguments)}, not an object")
    check_json(arguments, where)
    call: ToolCall = {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
    if name := text_of(item.get("id"), "id", f"{where}: "):
        call["id"] = name
    return call


def _function(item: Any, where: str) -> dict[str, Any]:
    """The part of a tool, or of a call, that has the function's name; raises InvalidError."""
    if not isinstance(item, dict):
        raise InvalidError(f"{where} is {kind_of(item)}, not an object with a function")
    if (kind := item.get("type")) not in (None, "function"):
        raise InvalidError(f"{where} is of type {clip(repr(kind), 40)}: only functions are known")
    function = item.get("function", item)
    if not isinstance(function, dict):
        raise InvalidError(f"{where}: 'function' is {kind_of(function)}, not an object")
    if not text_of(function.get("name"), "name", f"{where}: "):
        raise InvalidError(f"{where} has no name")
    return function


def check_json(value: Any, where: str) -> None:
    """Raise InvalidError for what can't be written as JSON in UTF-8."""
    if isinstance(value, str):
        text_of(value, value, f"{where}: ")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidError(f"{where} has the number {value}, which is no JSON")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_json(key, where)
            check_json(item, where)
    elif isinstance(value, list):
        for item in value:
            check_json(item, where)
    elif value is not None and not isinstance(value, int):
        raise InvalidError(f"{where} has {kind_of(value)}, which is no JSON")


def from_json(text: str, label: str, where: str = "") -> Any:
    """The value that a text holds as JSON; raises InvalidError."""
    try:
        return parse(text)
    except NotJsonError as error:
        hint = " (JSON has double quotes; is it Python's own notation?)" if "'" in text[:9] else ""
        raise InvalidError(f"{where}{name_of(label)} is no JSON: {error}{hint}") from error


def _only(whose: str, role: str, key: str, place: int) -> None:
    if role != whose:
        raise InvalidError(
            f"message {place} ({role}) has {key!r}, which belongs to the role {whose}"
        )


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


def cell_of(value: Any, label: str) -> str:
    """The text of a cell: of whole numbers and truth values as JSON spells them.

    A number with a decimal point has more than one spelling (1.10, 1.1), and the one that was
    written is not known any more. Raises InvalidError.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        raise InvalidError(
            f"{name_of(label)} is a number that may be spelled in several ways: write it as text"
        )
    return text_of(value, label)


def kind_of(value: object) -> str:
    if value is None:
        return "null"
    return _TYPES.get(type(value), "text" if isinstance(value, str) else type(value).__name__)


def message_of(role: str, content: str | None) -> Message:
    return {"role": role, "content": content or ""}
