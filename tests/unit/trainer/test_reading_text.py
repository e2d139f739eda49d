"""Plain text for continued pretraining: which files are read so, and which are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from finetune_trainer.contract import (
    DOCUMENT,
    Columns,
    Dataset,
    Objective,
    Reason,
    StageError,
    as_example,
    is_document,
)
from finetune_trainer.model.rendering import begun_and_rest
from finetune_trainer.model.tokenizer import pieces
from finetune_trainer.prepare.reading import Problems, open_shards

URI = "s3://data/rows"
TEXT = "  The kettle hums,\nand then it is hot.\n"


def read(file: Path, objective: Objective = "sft", **dataset: Any) -> tuple[list[str], str]:
    """What the rows say, and the layout."""
    settings = Dataset.model_validate({"source": URI, **dataset})
    source = open_shards([(file, URI)], settings, URI, objective)
    records = list(source.records(Problems()))
    assert all(is_document(as_example(record.messages)) for record in records)
    return [record.messages[0]["content"] for record in records], source.detected.layout


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_column_of_text_is_read_as_it_is(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "rows"
    if kind == "parquet":
        pq.write_table(pa.table({"text": [TEXT, "Tea."], "id": [1, 2]}), file)
    elif kind == "csv":
        file.write_text(f'id,text\n1,"{TEXT}"\n2,Tea.\n')
    else:
        file.write_text("".join(json.dumps({"text": t, "url": "x"}) + "\n" for t in (TEXT, "Tea.")))
    assert read(file) == ([TEXT, "Tea."], "text")


def test_a_column_by_another_name_is_mapped(tmp_path: Path) -> None:
    (file := tmp_path / "rows").write_text("body,label\nTea.,1\n")
    assert read(file, columns={"text": "body"}) == (["Tea."], "text")


@pytest.mark.parametrize(
    ("rows", "dataset", "words"),
    [
        ("text,label\nTea.,1\n", {}, ["'text' beside 'label'", "{text: text}"]),
        ("instruction,text\nHot?,Tea.\n", {}, ["'text' beside 'instruction'", "map instruction"]),
        (
            '{"text": "Tea."}\n{"instruction": "Hot?", "response": "Yes."}\n',
            {},
            ["objects with 'text' and others with 'instruction', 'response'"],
        ),
        ("text\nTea.\n", {"systemPrompt": "Be calm."}, ["spec.dataset.systemPrompt", "'text'"]),
    ],
)
def test_what_is_mixed_is_refused_by_name(
    rows: str, dataset: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    (file := tmp_path / "rows").write_text(rows)
    with pytest.raises(StageError) as caught:
        read(file, **dataset)
    assert all(word in caught.value.message for word in words), caught.value.message


def test_preferences_are_not_learnt_from_text(tmp_path: Path) -> None:
    (file := tmp_path / "rows").write_text("text\nTea.\n")
    with pytest.raises(StageError) as caught:
        read(file, "dpo", columns={"text": "text"})
    assert caught.value.reason is Reason.INVALID_CONFIG
    assert "objective dpo" in caught.value.message


def test_alpaca_s_text_beside_its_answers_is_no_plain_text(tmp_path: Path) -> None:
    (file := tmp_path / "rows").write_text("instruction,input,output,text\nHot?,,Yes.,Hot? Yes.\n")
    settings = Dataset.model_validate({"source": URI})
    source = open_shards([(file, URI)], settings, URI)
    (record,) = source.records(Problems())
    assert [message["role"] for message in record.messages] == ["user", "assistant"]
    assert source.detected.unused_columns == ("text",)


@pytest.mark.parametrize("other", [{"messages": "chat"}, {"instruction": "ask"}, {"tools": "t"}])
def test_text_stands_alone(other: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="must name no other column beside text"):
        Columns.model_validate({"text": "body", **other})


@pytest.mark.parametrize("limit", [2, 5, 16])
def test_every_token_but_the_first_is_predicted_once(limit: int) -> None:
    for length in range(2, 40):
        parts = pieces(length, limit)
        predicted = [place for part in parts for place in range(part.start + 1, part.stop)]
        assert predicted == list(range(1, length))
        assert all(part.stop - part.start <= limit for part in parts)


def test_a_model_goes_on_from_the_beginning_of_a_text() -> None:
    text = "The kettle hums, and then it is hot."
    begun, rest = begun_and_rest(text)
    assert begun + rest == text
    assert begun == "The kettle hums,"
    assert len(begun_and_rest("word " * 1000)[0]) <= 400
    assert begun_and_rest("xxxx") == ("xx", "xx")


def test_the_role_is_none_of_a_conversation() -> None:
    assert not is_document(as_example([{"role": "assistant", "content": "Yes."}]))
    assert is_document(as_example([{"role": DOCUMENT, "content": "Tea."}]))
