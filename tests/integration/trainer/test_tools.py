"""Conversations with tools, weights and reasoning: what the model's template makes of them, token
by token, and what is learnt. The templates are those of real models, as TRL carries them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
import trl
from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import (
    Example,
    Message,
    Reason,
    StageError,
    Tool,
    ToolCall,
    as_example,
)
from finetune_trainer.export.gate.rows import choose_rows, question_of, said
from finetune_trainer.model import ModelFolder, rendering
from finetune_trainer.model.rendering import NotRenderedError, render_example, render_prompt
from finetune_trainer.model.tokenizer import (
    IGNORED,
    PLAIN_TEMPLATE,
    Encoded,
    encode_batch,
    load_tokenizer,
)
from finetune_trainer.prepare.checks import check_template
from finetune_trainer.prepare.examples import write_examples
from finetune_trainer.prepare.split import hold_out
from finetune_trainer.train.recipe.data import tokenize
from tests.integration.trainer.test_prepare import lines, load, write

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


@pytest.fixture(scope="module")
def loaded(smollm2_folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelFolder(smollm2_folder))


@pytest.fixture
def tokenizer(loaded: PreTrainedTokenizerBase) -> Iterator[PreTrainedTokenizerBase]:
    template = loaded.chat_template
    yield loaded
    loaded.chat_template = template


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


def test_rows_that_a_template_takes_and_does_not(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """From the file to examples.jsonl: openai's notation in, tools out, bad rows by their cause."""
    use(tokenizer, "qwen3")
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in (
                {"messages": [user("Hot?"), assistant("Yes.")]},
                {"messages": CHAT, "tools": json.dumps([WEATHER])},
                {
                    "messages": [
                        user("1?"),
                        assistant("2", "Hm."),
                        user("3?"),
                        assistant("4", "So."),
                    ]
                },
                {
                    "messages": [
                        user("1?"),
                        assistant("2"),
                        user("3?"),
                        {**assistant("4"), "weight": 0},
                    ]
                },
                {"messages": [user("Hi"), {**assistant("Hello"), "name": "Ada"}]},
            )
        )
    )
    findings = load(tmp_path, None, onInvalidRow="skip", maxInvalidRows=2)
    report = write(findings, tokenizer, tmp_path / "out", limit=4096)
    kept = lines(tmp_path / "out" / "examples.jsonl")
    assert kept[:2] == [as_example([user("Hot?"), assistant("Yes.")]), as_example(CHAT, [WEATHER])]
    assert len(kept) == 3
    assert report["invalidRows"] == [
        {
            "row": 4,
            "cause": "the last answer has weight 0, and the model's chat template writes the "
            "earlier ones in another way once the conversation goes on: end the row with an "
            "answer to learn",
        },
        {
            "row": 5,
            "cause": "the model's chat template leaves out name: choose a model whose template "
            "knows that, or take it out of the rows",
        },
    ]
    assert report["conversations"] == {
        "withSeveralAnswers": 3,
        "onlyLastAnswerLearnt": 0,
        "someAnswersNotLearnt": 2,
        "earlierReasoningLeftOut": 1,
    }
    first = (tmp_path / "out" / "examples.jsonl").read_bytes().splitlines()[0]
    assert first == (
        b'{"prompt": [{"role": "user", "content": "Hot?"}], '
        b'"completion": [{"role": "assistant", "content": "Yes."}]}'
    )


def test_the_training_reads_conversations_with_tools(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    use(tokenizer, "qwen2_5")
    weighed = copy.deepcopy(CHAT)
    weighed[4]["weight"] = 0
    rows = [as_example(weighed, [WEATHER]), as_example([user("Hot?"), assistant("Yes.")])]
    file = tmp_path / "examples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = tokenize(file, tokenizer, 4096, tmp_path / "cache")
    expected = encode_batch(tokenizer, rows)
    assert [row["input_ids"] for row in read.rows] == [row.ids for row in expected]
    assert [row["labels"] for row in read.rows] == [row.labels for row in expected]
    assert read.learns_end


def test_the_export_reads_conversations_with_tools(tokenizer: PreTrainedTokenizerBase) -> None:
    use(tokenizer, "qwen2_5")
    example = as_example(CHAT, [WEATHER])
    rows = choose_rows(tokenizer, [example])
    assert rows.full_ids == (tuple(encode(tokenizer, example).ids),)
    assert WEATHER["function"]["description"] in rows.texts[0]
    assert render_prompt(tokenizer, example).endswith(
        "28 degrees\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    shown = 'And in Rome?\n\nweather_of({"city": "Rome"})\n\ntool: 28 degrees'
    assert question_of(example) == shown
    assert said(example["completion"][0]) == "It is hot."
    assert said(CHAT[2]) == 'weather_of({"city": "\\"Paris\\" ☕", "days": 2})'


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.2)


@pytest.mark.usefixtures("hasty")
def test_a_template_that_loops_is_ended(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = ENDLESS + str(tokenizer.chat_template)
    with pytest.raises(StageError) as caught:
        check_template(tokenizer, system=True)
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED
    assert "chat template computes for more than 0.2 seconds" in caught.value.message


@pytest.mark.usefixtures("hasty")
def test_a_template_that_loops_on_one_row_is_ended(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].content == 'no' %}" + ENDLESS + "{% endif %}"
    ) + str(tokenizer.chat_template)
    check_template(tokenizer, system=False)
    findings = load(tmp_path, [[user("yes"), assistant("a")], [user("no"), assistant("b")]])
    held = hold_out(findings.rows.hashes, 0)
    with pytest.raises(StageError) as caught:
        write_examples(findings.rows, held, tokenizer, 80, tmp_path / "out")
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED
