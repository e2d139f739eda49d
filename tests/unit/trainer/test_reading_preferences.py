"""Rows of preferences: pairs and labelled answers as they come, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract import Dataset, Objective, Reason, StageError
from finetune_trainer.prepare.dataset_files import row_hash
from finetune_trainer.prepare.reading import Problems, Record, open_shards

URI = "s3://data/rows"
USER, ASSISTANT = {"role": "user", "content": "Hot?"}, {"role": "assistant", "content": "Yes."}
PAIR = {"prompt": "Hot?", "chosen": "Yes.", "rejected": "No."}
LABELLED = {"prompt": "Hot?", "completion": "Yes.", "label": True}


def read(
    folder: Path, rows: list[Any] | str, objective: Objective, **dataset: Any
) -> tuple[list[Record], list[str]]:
    """The records, and the causes of bad rows; the dataset is CSV where it is text."""
    file = folder / "rows"
    file.write_text(rows if isinstance(rows, str) else "".join(f"{json.dumps(r)}\n" for r in rows))
    settings = Dataset.model_validate(
        {"source": URI, "onInvalidRow": "skip", "maxInvalidRows": "100%", **dataset}
    )
    problems, found = Problems(), []
    try:
        for record in open_shards([(file, URI)], settings, URI, objective).records(problems):
            found.append(record)
    except StageError as error:
        if error.reason is not Reason.INVALID_ROWS:
            raise
    return found, [bad.cause for bad in problems]


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(PAIR, id="texts"),
        pytest.param({"question": "Hot?", "chosen": "Yes.", "rejected": "No."}, id="a question"),
        pytest.param(
            {
                "prompt": [USER],
                "chosen": [ASSISTANT],
                "rejected": [{"role": "assistant", "content": "No."}],
            },
            id="messages",
        ),
        pytest.param(
            {
                "chosen": [USER, ASSISTANT],
                "rejected": [USER, {"role": "assistant", "content": "No."}],
            },
            id="whole conversations",
        ),
        pytest.param(
            {
                "prompt": "Hot?",
                "chosen": [USER, ASSISTANT],
                "rejected": [USER, {"role": "assistant", "content": "No."}],
            },
            id="whole conversations beside their prompt",
        ),
        pytest.param(
            {
                "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
                "preferred_output": [ASSISTANT],
                "non_preferred_output": [{"role": "assistant", "content": "No."}],
            },
            id="OpenAI's",
        ),
    ],
)
@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_a_pair(row: dict[str, Any], objective: Objective, tmp_path: Path) -> None:
    (record,), causes = read(tmp_path, [row], objective)
    assert not causes
    assert record.messages == (USER, ASSISTANT)
    assert record.rejected == {"role": "assistant", "content": "No."}
    assert record.label is None


def test_a_pair_in_a_table_with_further_input_and_other_names(tmp_path: Path) -> None:
    table = "ask,input,good,bad\nTranslate.,Hallo,Hello,Bye\n"
    columns = {"instruction": "ask", "chosen": "good", "rejected": "bad"}
    (record,), _ = read(tmp_path, table, "dpo", columns=columns, systemPrompt="Be brief.")
    said = [message["content"] for message in record.messages]
    assert said == ["Be brief.", "Translate.\n\nHallo", "Hello"]


def test_the_tools_of_openais_input_are_kept(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "weather"}}
    row = {
        "input": {"messages": [USER], "tools": [tool]},
        "preferred_output": [ASSISTANT],
        "non_preferred_output": [{"role": "assistant", "content": "No."}],
    }
    (record,), _ = read(tmp_path, [row], "dpo")
    assert record.tools == (tool,)


@pytest.mark.parametrize("label", [True, "TRUE", "true ", 1, "1"])
def test_a_good_answer(label: Any, tmp_path: Path) -> None:
    (record,), _ = read(tmp_path, [{**LABELLED, "label": label}], "kto")
    assert record.label is True
    assert record.rejected is None


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"messages": [USER, ASSISTANT], "label": False}, id="a conversation"),
        pytest.param({"instruction": "Hot?", "output": "Yes.", "label": "false"}, id="Alpaca"),
    ],
)
def test_a_bad_answer(row: dict[str, Any], tmp_path: Path) -> None:
    (record,), _ = read(tmp_path, [row], "kto")
    assert record.label is False
    assert record.messages == (USER, ASSISTANT)


@pytest.mark.parametrize(
    ("objective", "row", "cause"),
    [
        ("dpo", {**PAIR, "rejected": "Yes."}, "'chosen', 'rejected' say the same"),
        ("dpo", {**PAIR, "chosen": " "}, "'chosen' is blank"),
        ("dpo", {**PAIR, "rejected": None}, "'rejected' is blank"),
        ("orpo", {**PAIR, "prompt": ""}, "'prompt' is blank"),
        ("dpo", {**PAIR, "chosen": []}, "'chosen' is blank"),
        ("dpo", {**PAIR, "chosen": [ASSISTANT, USER, ASSISTANT]}, "'chosen' has 3 messages"),
        (
            "dpo",
            {"chosen": [USER, ASSISTANT], "rejected": [{**USER, "content": "?"}, ASSISTANT]},
            "differ before the last answer",
        ),
        ("dpo", {"chosen": "Human: Hot?", "rejected": "No."}, "there is no column with what"),
        ("dpo", {**PAIR, "chosen": [{**ASSISTANT, "weight": 0}]}, "weight 0"),
        ("kto", {**LABELLED, "label": "good"}, "'label' is 'good', not true or false: write true"),
        ("kto", {**LABELLED, "label": 2}, "'label' is '2', not true or false"),
        ("kto", {**LABELLED, "label": None}, "'label' is blank: write true"),
        ("kto", {**LABELLED, "completion": ""}, "'completion' is blank"),
    ],
)
def test_a_row_that_cant_be_used(
    objective: Objective, row: dict[str, Any], cause: str, tmp_path: Path
) -> None:
    records, causes = read(tmp_path, [row], objective)
    assert not records
    (found,) = causes
    assert cause in found


@pytest.mark.parametrize(
    ("objective", "row", "reason", "parts"),
    [
        ("sft", PAIR, Reason.COLUMN_NOT_FOUND, ["spec.training.objective to dpo", "columns."]),
        ("sft", LABELLED, Reason.INVALID_CONFIG, ["objective is sft", "{instruction: prompt"]),
        (
            "dpo",
            {"instruction": "Hot?", "response": "Yes."},
            Reason.COLUMN_NOT_FOUND,
            ["objective is dpo", "a chosen and a rejected one", "set it to sft"],
        ),
        (
            "kto",
            {"prompt": "Hot?", "completion": "Yes."},
            Reason.COLUMN_NOT_FOUND,
            ["objective is kto", "a label (true or false)"],
        ),
        ("orpo", {"prompt": "Hot?", "chosen": "Yes."}, Reason.COLUMN_NOT_FOUND, ["'rejected'"]),
    ],
)
def test_data_of_another_objective_is_refused(
    objective: Objective, row: dict[str, Any], reason: Reason, parts: list[str], tmp_path: Path
) -> None:
    """With what to change."""
    with pytest.raises(StageError) as caught:
        read(tmp_path, [row], objective)
    assert caught.value.reason is reason
    for part in parts:
        assert part in caught.value.message


def test_labels_are_passed_over_where_the_columns_are_named(tmp_path: Path) -> None:
    columns = {"instruction": "prompt", "response": "completion"}
    (record,), _ = read(tmp_path, [LABELLED], "sft", columns=columns)
    assert record.label is None


def test_two_roles_of_one_column_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="chosen and rejected are both 'a'"):
        read(tmp_path, [PAIR], "dpo", columns={"chosen": "a", "rejected": "a"})


def test_a_rows_hash_knows_what_was_judged() -> None:
    """So that a row with another rejected answer is no repetition."""
    said: list[Any] = [USER, ASSISTANT]
    judged: list[dict[str, Any]] = [{"label": True}, {"label": False}, {"rejected": ASSISTANT}]
    plain = row_hash(said, 1)
    assert len({plain, *(row_hash(said, 1, (), each) for each in judged)}) == 4
    assert row_hash(said, 1, (), {"label": None}) == plain
