"""Conversations with tools on their way through the stages, and templates that never end."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import (
    Reason,
    StageError,
    as_example,
)
from finetune_trainer.export.gate.rows import choose_rows, question_of, said
from finetune_trainer.model import rendering
from finetune_trainer.model.rendering import render_prompt
from finetune_trainer.model.token_rows import tokens_of
from finetune_trainer.model.tokenizer import (
    encode_batch,
)
from finetune_trainer.prepare.checks import check_template
from finetune_trainer.prepare.dataset_files import hold_out
from finetune_trainer.prepare.examples import write_examples
from finetune_trainer.train.recipe.data import tokenize
from tests.integration.trainer.chats import (
    CHAT,
    WEATHER,
    assistant,
    encode,
    use,
    user,
)
from tests.integration.trainer.test_prepare import lines, load, write


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
        write_examples(
            findings.rows, held, tokenizer, tokens_of(tokenizer, "sft", 80), tmp_path / "out"
        )
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED
