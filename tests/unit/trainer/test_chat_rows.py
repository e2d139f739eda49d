"""Rows as OpenAI's JSONL has them: messages with tools, weights and reasoning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract import Dataset, Message, Reason, StageError, Tool, ToolCall
from finetune_trainer.prepare.dataset_files import row_hash
from finetune_trainer.prepare.reading import Problems, Record
from tests.reading import read_records

CORPUS = Path(__file__).parents[2] / "data" / "corpus"
WEATHER: Tool = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name"},
                "days": {"type": "integer"},
            },
            "required": ["city"],
        },
    },
}


def read(file: Path, **dataset: Any) -> list[Record]:
    settings = Dataset.model_validate({"source": str(file), **dataset})
    return list(read_records(file, settings, str(file), Problems()))


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def call(arguments: dict[str, Any], name: str = "c1") -> ToolCall:
    return {
        "type": "function",
        "function": {"name": "weather", "arguments": arguments},
        "id": name,
    }


def calling(*calls: ToolCall) -> Message:
    return {"role": "assistant", "content": "", "tool_calls": [*calls]}


def answering(text: str, name: str = "c1") -> Message:
    return {"role": "tool", "content": text, "tool_call_id": name}


PARIS = [
    user("Weather in Paris?"),
    calling(call({"city": "Paris", "days": 2})),
    answering("18 °C"),
    assistant("It is 18 °C."),
]


def test_openais_chat_format() -> None:
    found = [list(record.messages) for record in read(CORPUS / "openai-chat.jsonl")]
    assert found == [
        [
            {"role": "system", "content": "Be brief."},
            user("Who made you?"),
            assistant("Odalys."),
        ],
        [user("Hot?"), {**assistant("Cold."), "weight": 0}, user("Really?"), assistant("Hot.")],
        [assistant("Hello, I am a kettle."), user("Hot?"), assistant("Yes.")],
        [user("Hot?"), user("Answer!"), assistant("Yes."), assistant("Very.")],
        [user("17+4?"), {**assistant("21"), "reasoning_content": "Seventeen and four."}],
    ]


def test_openais_format_with_tools() -> None:
    records = read(CORPUS / "openai-tools.jsonl")
    assert [(list(record.messages), list(record.tools)) for record in records] == [
        (PARIS, [WEATHER]),
        (PARIS[:2], [WEATHER]),
        ([user("Hi"), assistant("Hello")], []),
        (
            [
                user("Both?"),
                calling(call({"city": "Paris"}), call({"city": "Rom"}, "c2")),
                answering("18"),
                answering("", "c2"),
                assistant("18 and nothing."),
            ],
            [
                {
                    "type": "function",
                    "function": {
                        "name": "weather",
                        "parameters": {"type": "object", "properties": {}},
                    },
                }
            ],
        ),
    ]


def test_answers_of_tools_stand_in_the_order_of_their_calls(tmp_path: Path) -> None:
    """Qwen's template, for one, writes no tool_call_id: the place tells which call is answered."""
    calls = calling(call({"city": "Paris"}, "c1"), call({"city": "Rom"}, "c2"))
    answers = [answering("Rom: 28", "c2"), answering("Paris: 18", "c1")]
    row = [user("Both?"), calls, *answers, assistant("28 and 18.")]
    (record,) = read(written(tmp_path, {"messages": row}))
    assert list(record.messages) == [*row[:2], *reversed(answers), row[4]]


def test_nulls_of_parquet_are_no_arguments() -> None:
    first, second = read(CORPUS / "openai-tools.parquet")
    assert (list(first.messages), list(first.tools)) == (PARIS, [WEATHER])
    assert second.messages[1] == calling(call({"city": "Rom", "country": "Italy"}))
    assert second.tools == ()


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_tools_may_have_another_column(tmp_path: Path) -> None:
    file = written(tmp_path, {"messages": PARIS, "abilities": [WEATHER]})
    (record,) = read(file, columns={"tools": "abilities"})
    assert record.tools == (WEATHER,)
    with pytest.raises(StageError) as caught:
        read(file, columns={"tools": "skills"})
    assert caught.value.reason is Reason.COLUMN_NOT_FOUND
    assert "has no key 'skills'" in caught.value.message
    assert "spec.dataset.columns.tools" in caught.value.message


def test_tools_stand_beside_instructions_where_they_are_mapped(tmp_path: Path) -> None:
    row = {"instruction": "Who?", "response": "Me", "tools": [WEATHER]}
    (mapped,) = read(written(tmp_path, row), columns={"tools": "tools"})
    assert (mapped.messages, mapped.tools) == ((user("Who?"), assistant("Me")), (WEATHER,))
    (other,) = read(written(tmp_path, row))
    assert other.tools == ()  # an unused column like any other


@pytest.mark.parametrize(
    ("tools", "cause"),
    [
        ("no JSON", "'tools' is no JSON"),
        ({"name": "weather"}, "'tools' is an object, not a list of tools"),
        (["weather"], "tools[0] is text, not an object with a function"),
        ([WEATHER, {"type": "web_search"}], "tools[1] is of type 'web_search'"),
        ([{"type": "function", "function": {"name": " "}}], "tools[0] has no name"),
        ([{"function": "weather"}], "tools[0]: 'function' is text, not an object"),
        ([{"function": {"name": "a", "description": "\udc00"}}], "half a surrogate pair"),
    ],
)
def test_what_is_no_list_of_tools_is_named(tmp_path: Path, tools: Any, cause: str) -> None:
    with pytest.raises(StageError) as caught:
        read(written(tmp_path, {"messages": PARIS, "tools": tools}))
    assert caught.value.reason is Reason.INVALID_ROWS
    assert f"line 1: {cause}" in caught.value.message or cause in caught.value.message


def test_messages_keep_their_numbers_beside_a_blank_system_prompt(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"message 2 \(user\) is blank"):
        read(written(tmp_path, {"messages": [{"role": "system", "content": ""}, *PARIS_BLANK]}))


PARIS_BLANK = [user(" "), assistant("b")]


def test_the_hash_of_a_plain_row_stays_and_more_than_text_counts() -> None:
    plain = [user("Who?"), assistant("Me")]
    assert row_hash(plain, 42) == 0x209675F556002C8E
    others = [
        row_hash(plain, 42, [WEATHER]),
        row_hash([user("Who?"), {**assistant("Me"), "reasoning_content": "Hm."}], 42),
        row_hash([user("Who?"), {**assistant("Me"), "tool_calls": [call({"a": 1})]}], 42),
        row_hash([user("Who?"), {**assistant("Me"), "tool_calls": [call({"a": 2})]}], 42),
    ]
    assert len({row_hash(plain, 42), *others}) == 5
