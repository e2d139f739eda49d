"""Conversations with tools, and the templates of real models, as TRL carries them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trl
from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import (
    Example,
    Message,
    Tool,
    ToolCall,
)
from finetune_trainer.model.tokenizer import (
    IGNORED,
    Encoded,
    encode_batch,
)

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
OWN = Path(__file__).parents[2] / "data" / "chat_templates"

WEATHER: Tool = {
    "type": "function",
    "function": {
        "name": "weather_of",
        "description": "Looks out of the window",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where the window is"},
                "days": {"type": "integer", "description": "How far ahead"},
            },
            "required": ["city"],
        },
    },
}
SYSTEM: Message = {"role": "system", "content": "Be a kettle."}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, thought: str | None = None) -> Message:
    message: Message = {"role": "assistant", "content": text}
    if thought:
        message["reasoning_content"] = thought
    return message


def call(name: str = "call00001", **arguments: Any) -> ToolCall:
    return {
        "type": "function",
        "function": {"name": "weather_of", "arguments": arguments},
        "id": name,
    }


def calling(*calls: ToolCall, text: str = "", thought: str | None = None) -> Message:
    return {**assistant(text, thought), "tool_calls": list(calls)}


def answering(text: str, name: str = "call00001") -> Message:
    return {"role": "tool", "content": text, "tool_call_id": name}


CHAT: list[Message] = [
    SYSTEM,
    user("Weather in Paris?"),
    calling(call(city='"Paris" ☕', days=2)),
    answering("18 degrees"),
    assistant("It is mild."),
    user("And in Rome?"),
    calling(call("call00002", city="Rome")),
    answering("28 degrees", "call00002"),
    assistant("It is hot."),
]


def use(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")


def encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> Encoded:
    (encoded,) = encode_batch(tokenizer, [example])
    assert all(label in (IGNORED, i) for i, label in zip(encoded.ids, encoded.labels, strict=True))
    return encoded


def learnt(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> list[str]:
    """The stretches of text that loss is computed on."""
    stretches: list[list[int]] = [[]]
    for label in encoded.labels:
        if label != IGNORED:
            stretches[-1].append(label)
        elif stretches[-1]:
            stretches.append([])
    return [str(tokenizer.decode(stretch)) for stretch in stretches if stretch]
