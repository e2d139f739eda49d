"""Which templates know tools and reasoning, and how a row is refused that a template would lose a
part of."""

from __future__ import annotations

import copy

import jinja2
import pytest
from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import (
    Example,
    Message,
    Tool,
    as_example,
)
from finetune_trainer.model.rendering import NotRenderedError, render_example
from finetune_trainer.model.tokenizer import (
    PLAIN_TEMPLATE,
)
from tests.integration.trainer.chats import (
    CHAT,
    OWN,
    SYSTEM,
    WEATHER,
    assistant,
    call,
    calling,
    encode,
    use,
    user,
)

KNOWN = {  # docs/data.md has this as a table: whether tools and reasoning are taken
    "qwen2_5": (True, False),
    "qwen3_instruct_2507": (True, False),
    "llama3_1": (True, False),
    "llama3_2": (True, False),
    "lfm2_v2": (True, False),
    "qwen3": (True, True),
    "qwen3_5_think": (True, True),
    "qwen3_6": (True, True),
    "glm4moe": (True, True),
    "lfm2_2_5": (True, True),
    "nemotron_3_nano": (True, True),
    "gptoss": (True, True),
    "gemma4": (True, False),
    "gemma4_v5": (True, True),
    "deepseekv3": (False, False),
    "gemma": (False, False),
    "gemma3": (False, False),
    "phi3": (False, False),
    "llama3": (False, False),
    "cohere": (False, False),
}


@pytest.mark.parametrize("template", KNOWN)
def test_which_templates_know_tools_and_reasoning(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    use(tokenizer, template)
    rows = as_example(CHAT[1:], [WEATHER]), as_example([user("1?"), assistant("2", "Hm.")])
    assert tuple(is_taken(tokenizer, row) for row in rows) == KNOWN[template]


def is_taken(tokenizer: PreTrainedTokenizerBase, row: Example) -> bool:
    try:
        encode(tokenizer, row)
    except (NotRenderedError, jinja2.TemplateError, TypeError):
        return False
    return True


REFUSED = [
    ("phi3", [WEATHER], CHAT, "tools, tool_calls, the content of the role tool"),
    ("llama3", [], CHAT, "tool_calls"),
    ("lfm2", [WEATHER], CHAT, "tool_calls"),
    ("qwen2_5", [], [user("1?"), assistant("2", "Hm.")], "reasoning_content"),
    ("qwen2_5", [], [user("1?"), assistant("2", "Hm."), user("3?"), assistant("4")], "reasoning"),
    ("llama3_1", [WEATHER], [user("1?"), calling(call(city="A"), text="Let me look.")], "beside"),
    ("llama3_2", [WEATHER], [user("1?"), calling(call(city="A"), text="Let me look.")], "beside"),
    ("qwen2_5", [], [{**user("Hi"), "name": "Ada"}, assistant("Hello")], "name"),
]


@pytest.mark.parametrize(("template", "tools", "chat", "cause"), REFUSED)
def test_what_the_template_does_not_know_is_named(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    tools: list[Tool],
    chat: list[Message],
    cause: str,
) -> None:
    use(tokenizer, template)
    with pytest.raises(NotRenderedError, match=f"leaves out (the content )?{cause}"):
        encode(tokenizer, as_example(chat, tools))


def test_a_system_message_in_between_is_refused_where_it_would_be_dropped(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    chat = [user("a"), SYSTEM, assistant("b")]
    use(tokenizer, "qwen2_5")
    assert "Be a kettle." in render_example(tokenizer, as_example(chat))
    tokenizer.chat_template = (OWN / "mistral.jinja").read_text()
    with pytest.raises(NotRenderedError, match="leaves out the content of the role system"):
        render_example(tokenizer, as_example(chat))


def test_a_base_model_without_a_template_knows_no_tools(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = PLAIN_TEMPLATE
    with pytest.raises(NotRenderedError, match="leaves out tools, tool_calls: choose a model"):
        encode(tokenizer, as_example(CHAT[:3], [WEATHER]))


def test_what_the_template_itself_says_is_the_cause(tokenizer: PreTrainedTokenizerBase) -> None:
    use(tokenizer, "llama3_1")
    two = [user("1?"), calling(call(city="A"), call("call00002", city="B"))]
    with pytest.raises(jinja2.TemplateError, match="only supports single tool-calls"):
        encode(tokenizer, as_example(two, [WEATHER]))


def test_what_comes_before_the_last_answer_must_stay_the_same(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """gpt-oss drops the reasoning before a call once an answer follows: what the tool said would be
    taken for a part of the answer."""
    use(tokenizer, "gptoss")
    call_and_answer = copy.deepcopy(CHAT[:5])
    encode(tokenizer, as_example(call_and_answer, [WEATHER]))
    call_and_answer[2]["reasoning_content"] = "A window."
    with pytest.raises(NotRenderedError, match="before the last answer in another way"):
        encode(tokenizer, as_example(call_and_answer, [WEATHER]))
