"""What another version wrote is read as far as it can be understood, and the rest is named."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from finetune_trainer.__main__ import _say_what_is_ignored
from finetune_trainer.contract import (
    Base,
    Reason,
    RunConfig,
    StageResult,
    Tolerated,
    read_known,
    read_readable,
    read_run_config,
)


class Colour(StrEnum):
    RED = "red"


class Leaf(Base):
    name: str
    colour: Colour = Colour.RED


class Tree(Base):
    leaf: Leaf | None = None
    leaves: tuple[Leaf, ...] = ()
    weights: dict[str, float] = {}
    tree_height: int = 1


def test_what_is_known_is_read_as_it_is() -> None:
    data = {"leaf": {"name": "a"}, "treeHeight": 3}
    tree = Tree(leaf=Leaf(name="a"), tree_height=3)
    assert read_known(Tree, data) == read_readable(Tree, data) == Tolerated(tree)


def test_unknown_fields_are_left_out_and_named_at_any_depth() -> None:
    data = {
        "later": 1,
        "leaf": {"name": "a", "later": {"deep": 1}},
        "leaves": [{"name": "b", "later": 1}, {"name": "c"}],
    }
    read = read_known(Tree, data)
    assert read.value == Tree(leaf=Leaf(name="a"), leaves=(Leaf(name="b"), Leaf(name="c")))
    assert read.unknown == ("leaf.later", "leaves.0.later", "later")
    assert data["leaf"] == {"name": "a", "later": {"deep": 1}}, "what was given is left alone"


@pytest.mark.parametrize(
    ("data", "tree", "unreadable"),
    [
        pytest.param({"treeHeight": "tall"}, Tree(), ("treeHeight",), id="a value"),
        pytest.param(
            {"leaf": {"name": "a", "colour": "blue"}},
            Tree(leaf=Leaf(name="a")),
            ("leaf.colour",),
            id="a word that came later",
        ),
        pytest.param({"leaf": {"colour": "red"}}, Tree(), ("leaf",), id="what lacks its name"),
        pytest.param(
            {"leaves": [{"name": "a"}, {}, {"name": 1}, {"name": "b"}]},
            Tree(leaves=(Leaf(name="a"), Leaf(name="b"))),
            ("leaves.1", "leaves.2.name", "leaves.1"),
            id="items of a list",
        ),
        pytest.param({"weights": {"a": 1, "b": "x"}}, Tree(weights={"a": 1}), ("weights.b",)),
    ],
)
def test_what_cannot_be_understood_is_left_out(
    data: Any, tree: Tree, unreadable: tuple[str, ...]
) -> None:
    read = read_readable(Tree, data)
    assert read is not None
    assert (read.value, read.unreadable) == (tree, tuple(dict.fromkeys(unreadable)))
    with pytest.raises(ValidationError):
        read_known(Tree, data)


def test_without_what_is_required_there_is_nothing() -> None:
    assert read_readable(Leaf, {"colour": "red"}) is None
    assert read_readable(Leaf, ["a"]) is None


def test_a_newer_trainers_result_is_understood() -> None:
    text = json.dumps(
        {
            "stage": "train",
            "reason": "Succeeded",
            "message": "45 steps",
            "energy": {"kWh": 3},
            "notices": [
                {"code": "LossRising", "evidence": "a", "remedy": "b", "chart": "c"},
                {"code": "LossRising"},
            ],
        }
    )
    result = StageResult.from_message(text)
    assert result is not None
    assert (result.reason, result.message) == (Reason.SUCCEEDED, "45 steps")
    assert [each.evidence for each in result.notices] == ["a"]


def test_a_reason_that_came_later_keeps_its_name() -> None:
    result = StageResult.from_message(
        '{"stage": "prepare", "reason": "DatasetTooOdd", "message": "Mend it."}'
    )
    assert result is not None
    assert (result.reason, result.message) == (Reason.INTERNAL_ERROR, "DatasetTooOdd: Mend it.")


RUN: dict[str, Any] = {
    "model": {"source": "org/base"},
    "dataset": {"source": "s3://data/faq.csv"},
    "output": {"uri": "s3://models/support"},
}


def test_run_json_of_a_newer_operator_is_read(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({**RUN, "training": {"epochs": 2, "later": 1}, "hints": []}))
    read = read_run_config(file)
    assert read.value.training.epochs == 2
    assert read.unknown == ("training.later", "hints")


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({**RUN, "training": {"epochs": 0}})])
def test_run_json_with_a_wrong_value_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.json"
    file.write_text(text)
    with pytest.raises(ValidationError):
        read_run_config(file)


def test_a_stage_says_what_its_older_image_ignores() -> None:
    config = RunConfig.model_validate(RUN)
    assert _say_what_is_ignored(Tolerated(config)) == ""
    said = _say_what_is_ignored(Tolerated(config, unknown=("training.later", "hints")))
    assert said == (
        " (this trainer image is older than the operator and ignores training.later, hints)"
    )
