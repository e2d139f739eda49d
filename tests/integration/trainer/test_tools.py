"""Conversations with tools, weights and reasoning: what the model's template makes of them, token
by token, and what is learnt."""

from __future__ import annotations

import copy
from typing import Any

import jinja2
import pytest
from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import (
    Example,
    StageError,
    as_example,
)
from finetune_trainer.model.rendering import NotRenderedError
from finetune_trainer.model.tokenizer import (
    IGNORED,
    Encoded,
)
from tests.integration.trainer.chats import (
    CHAT,
    SYSTEM,
    TEMPLATES,
    WEATHER,
    assistant,
    call,
    calling,
    encode,
    learnt,
    use,
    user,
)


def by_transformers(
    tokenizer: PreTrainedTokenizerBase, example: Example, **options: Any
) -> dict[str, list[int]]:
    """Token ids, and the mask of answers, straight from transformers."""
    messages: list[Any] = [{**message} for message in example["prompt"] + example["completion"]]
    tools: list[Any] | None = example.get("tools")
    return dict(tokenizer.apply_chat_template(messages, tools=tools, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "llama3_1", "glm4moe", "muse_glimmer"])
def test_the_tokens_are_those_of_transformers(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    use(tokenizer, template)
    example = as_example(CHAT, [WEATHER])
    assert encode(tokenizer, example).ids == by_transformers(tokenizer, example)["input_ids"]


@pytest.mark.parametrize(
    ("template", "header"),
    [("qwen2_5_training", "\n"), ("qwen3_training", ""), ("qwen3_instruct_2507_training", "")],
)
def test_the_labels_are_what_the_template_marks_as_generated(
    tokenizer: PreTrainedTokenizerBase, template: str, header: str
) -> None:
    """Qwen2.5's marks begin before the line end, which is the prompt's when the model answers."""
    use(tokenizer, template)
    example = as_example(CHAT, [WEATHER])
    encoded = encode(tokenizer, example)
    marked = by_transformers(tokenizer, example, return_assistant_tokens_mask=True)
    theirs = [
        token if mask else IGNORED
        for token, mask in zip(marked["input_ids"], marked["assistant_masks"], strict=True)
    ]
    assert encoded.ids == marked["input_ids"]
    assert learnt(tokenizer, encoded) == [
        text.removeprefix(header)
        for text in learnt(tokenizer, Encoded(encoded.ids, theirs, only_last=False))
    ]
    assert sum(label != IGNORED for label in encoded.labels) == sum(marked["assistant_masks"]) - (
        4 * len(header)
    )


def test_calls_and_answers_are_learnt_and_results_are_not(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    use(tokenizer, "qwen2_5")
    encoded = encode(tokenizer, as_example(CHAT, [WEATHER]))
    assert learnt(tokenizer, encoded) == [
        '<tool_call>\n{"name": "weather_of", "arguments": {"city": "\\"Paris\\" ☕", "days": 2}}\n'
        "</tool_call><|im_end|>\n",
        "It is mild.<|im_end|>\n",
        '<tool_call>\n{"name": "weather_of", "arguments": {"city": "Rome"}}\n'
        "</tool_call><|im_end|>\n",
        "It is hot.<|im_end|>\n",
    ]
    assert not encoded.only_last
    assert not encoded.some_left


def test_a_call_is_learnt_where_the_template_writes_it_in_another_way_later(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Qwen3 puts an empty block of reasoning before the last answer, and removes it later."""
    use(tokenizer, "qwen3")
    encoded = encode(tokenizer, as_example(CHAT, [WEATHER]))
    assert learnt(tokenizer, encoded) == [
        '<tool_call>\n{"name": "weather_of", "arguments": {"city": "\\"Paris\\" ☕", "days": 2}}\n'
        "</tool_call><|im_end|>\n",
        '<tool_call>\n{"name": "weather_of", "arguments": {"city": "Rome"}}\n'
        "</tool_call><|im_end|>\n",
        "<think>\n\n</think>\n\nIt is hot.<|im_end|>\n",
    ]
    assert encoded.some_left


def test_a_conversation_may_end_with_a_call(tokenizer: PreTrainedTokenizerBase) -> None:
    use(tokenizer, "qwen2_5")
    (text,) = learnt(tokenizer, encode(tokenizer, as_example(CHAT[:3], [WEATHER])))
    assert text.startswith('<tool_call>\n{"name": "weather_of"')


@pytest.mark.parametrize("template", sorted(f.stem for f in TEMPLATES.glob("*.jinja")))
@pytest.mark.parametrize("thinking", [False, True])
def test_any_template_renders_all_or_the_row_is_refused(
    tokenizer: PreTrainedTokenizerBase, template: str, thinking: bool
) -> None:
    """Whatever a template does, nothing but what the assistant said is ever learnt."""
    use(tokenizer, template)
    chat = copy.deepcopy(CHAT)
    if thinking:
        for number, message in enumerate(chat):
            if message["role"] == "assistant":
                message["reasoning_content"] = f"Thought {number}."
    try:
        encoded = encode(tokenizer, as_example(chat, [WEATHER]))
    except Exception as error:
        if isinstance(error, StageError):
            raise
        return
    whole, answers = str(tokenizer.decode(encoded.ids)), learnt(tokenizer, encoded)
    for text in ("Be a kettle.", "And in Rome?", "18 degrees", "28 degrees", "Looks out"):
        assert text in whole
        assert not any(text in answer for answer in answers)
    assert "It is hot." in answers[-1]
    if thinking:
        assert "Thought 8." in whole
        assert encoded.leaves_reasoning_out == ("Thought 2." not in whole)
    if not encoded.some_left:
        expected = ["Paris", "It is mild", "Rome", "It is hot"]
        assert all(text in "".join(answers) for text in expected)


AS_TEXT = (  # of its own: calls only beside no content, with arguments as JSON text
    "{% for t in tools or [] %}<tool>{{ t | tojson }}</tool>{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is none %}{% for c in m.tool_calls %}"
    "{{ '<call>' + c.function.name + c.function.arguments + '</call>' }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_arguments_are_json_text_where_the_template_wants_that(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.chat_template = AS_TEXT
    first, *_ = learnt(tokenizer, encode(tokenizer, as_example(CHAT, [WEATHER])))
    assert first == '<call>weather_of{"city": "\\"Paris\\" ☕", "days": 2}</call><|im_end|>\n'
    with pytest.raises(NotRenderedError, match="leaves out tool_calls"):  # beside content
        encode(tokenizer, as_example([user("a"), calling(call(city="A"), text="Let me look.")]))


def test_reasoning_is_learnt_where_the_template_writes_it(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    use(tokenizer, "qwen3")
    chat = [user("1?"), assistant("2", "First."), user("3?"), assistant("4", "Then.")]
    encoded = encode(tokenizer, as_example(chat))
    assert learnt(tokenizer, encoded) == ["<think>\nThen.\n</think>\n\n4<|im_end|>\n"]
    assert encoded.leaves_reasoning_out
    assert encoded.some_left
    use(tokenizer, "gptoss")  # has it under another key
    assert "Then.<|end|>" in learnt(tokenizer, encode(tokenizer, as_example(chat)))[-1]


def test_an_answer_of_weight_0_is_read_and_not_learnt(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [user("1?"), assistant("2"), user("3?"), assistant("4"), user("5?"), assistant("6")]
    plain = encode(tokenizer, as_example(chat))
    for place in (1, 3, 5):
        weighed = copy.deepcopy(chat)
        weighed[place]["weight"] = 0
        encoded = encode(tokenizer, as_example(weighed))
        assert encoded.ids == plain.ids
        texts = [text for n, text in ((1, "2"), (3, "4"), (5, "6")) if n != place]
        assert learnt(tokenizer, encoded) == [f"{text}<|im_end|>\n" for text in texts]
        assert not encoded.only_last
        assert not encoded.some_left


def test_turns_in_any_order_that_the_template_takes(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [assistant("Hello."), user("Hot?"), user("Answer!"), assistant("Yes."), assistant("So.")]
    answers = learnt(tokenizer, encode(tokenizer, as_example([SYSTEM, *chat])))
    assert answers == ["Hello.<|im_end|>\n", "Yes.<|im_end|>\n", "So.<|im_end|>\n"]
    use(tokenizer, "gemma")
    with pytest.raises(jinja2.TemplateError, match="roles must alternate"):
        encode(tokenizer, as_example(chat))
