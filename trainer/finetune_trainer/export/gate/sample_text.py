"""What a person reads of a conversation in a sample: the turn that is answered, and the answer."""

from __future__ import annotations

import json

from finetune_trainer.contract import Example, Message


def question_of(example: Example) -> str:
    """The last question, and what tools were asked and answered since."""
    turns = example["prompt"]
    asked = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
    since = turns[asked[-1] :] if asked else turns[-1:]
    return "\n\n".join(
        f"{turn.get('name', 'tool')}: {turn['content']}" if turn["role"] == "tool" else said(turn)
        for turn in since
    )


def said(message: Message) -> str:
    """What a message says, with the tools that it calls."""
    functions = [call["function"] for call in message.get("tool_calls", [])]
    calls = [f"{f['name']}({json.dumps(f['arguments'], ensure_ascii=False)})" for f in functions]
    parts = [message.get("reasoning_content", ""), message["content"], *calls]
    return "\n\n".join(part for part in parts if part)
