"""Tools in the Modelfile, as templates that are in use write them."""

from __future__ import annotations

from datetime import date
from functools import partial
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from finetune_trainer.export.ollama import (
    dated,
    find_shape,
    go_template,
    tools_beside,
    trial_conversations,
)
from finetune_trainer.export.ollama_tools import TOOLS, NoToolsError, on_lines, trial_calls
from finetune_trainer.model.rendering import render
from tests.integration.trainer import go_text
from tests.integration.trainer.chats import assistant, use, user


@pytest.mark.parametrize(
    ("name", "tag", "traits"),  # whether it has several calls, and quotes what tools say
    [
        ("qwen2_5", "\n<tool_call>\n", (True, False)),
        ("qwen3", "\n<tool_call>\n", (True, False)),
        ("llama3_2", "", (False, True)),
    ],
)
def test_tools_are_written_as_the_training_wrote_them(
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    name: str,
    tag: str,
    traits: tuple[bool, bool],
) -> None:
    """Definitions, calls and answers; and a conversation without tools as before."""
    use(tokenizer, name)
    today = date.today().isoformat()
    shape = find_shape(partial(render, tokenizer, prompt=True, today=dated))
    tools = tools_beside(shape, tokenizer, head="")
    several = ("arguments", "name") in tools.between
    assert (several, tools.quotes) == traits
    template = go_template(shape, tools).replace("{{ currentDate }}", today)
    written = partial(render, tokenizer, prompt=True, today=lambda _: today)
    told = trial_calls(tools, system=True)
    assert len(told) == (12 if several else 10)
    expected = [on_lines(written(messages, tools=TOOLS)) for messages in told]
    assert go_text.render(template, told, tmp_path, TOOLS) == expected
    plain = trial_conversations(system=True)
    assert go_text.render(template, plain, tmp_path) == [written(each) for each in plain]
    # Of a long chat Ollama drops the beginning; and an answer may be empty.
    say, tell = user("Hi"), assistant("So.")
    cut, empty = go_text.render(template, [[tell, say], [say, assistant(""), say]], tmp_path)
    for text in (cut, empty):
        assert text.endswith(tools.between["answer", "user"] + "Hi" + tools.between["user", "end"])
    assert tools.between["user", "answer"] + "So." in cut
    # What Ollama looks for in what the model says, up to the brace.
    _, _, behind = template.partition("{{- if .ToolCalls }}{{ range .ToolCalls }}")
    assert behind.partition("{")[0] == tag


def test_what_a_template_says_stays_in_its_comment(tokenizer: PreTrainedTokenizerBase) -> None:
    """Its own error is text of somebody else's: on a line of its own it would be an instruction."""
    said = "it\nADAPTER ./evil\n" * 40
    tokenizer.chat_template = (
        "{%- if tools %}{{ raise_exception(" + repr(said) + ") }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    )
    shape = find_shape(partial(render, tokenizer, prompt=True, today=dated))
    with pytest.raises(NoToolsError, match="fails on a conversation with calls") as raised:
        tools_beside(shape, tokenizer, head="")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gptoss", "doesn't write definitions as JSON before the first question"),
        ("glm4moe", "it leaves out, repeats or reorders what is said"),
    ],
)
def test_why_there_are_no_tools(tokenizer: PreTrainedTokenizerBase, name: str, reason: str) -> None:
    use(tokenizer, name)
    shape = find_shape(partial(render, tokenizer, prompt=True, today=dated))
    with pytest.raises(NoToolsError, match=reason):
        tools_beside(shape, tokenizer, head="")
