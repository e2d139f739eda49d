"""The table of docs/architecture.md says of each field what the fingerprints do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finetune_trainer.contract import Stage
from hack.stage_table import (
    BEGIN,
    CASES,
    END,
    INDIRECT,
    NO,
    NOTHING,
    USUAL,
    YES,
    SpecField,
    measure,
    spec_fields,
    table,
    write_into,
)

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
FIELDS = {field.path: field for field in spec_fields()}


def rows() -> dict[str, dict[Stage, str]]:
    """What the page says of each stage, by field."""
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    counting, _, others = text.partition(NOTHING)
    line = re.compile(r"^\| `([\w.]+)` \| (.+) \| (.+) \| (.+) \|$", re.MULTILINE)
    found = {path: dict(zip(Stage, cells, strict=True)) for path, *cells in line.findall(counting)}
    for part in re.findall(r"`([\w.]+)`", others):
        below = [path for path in FIELDS if f"{path}.".startswith(f"{part}.")]
        assert below, f"there is no spec.{part}"
        for path in below:
            assert path not in found
            found[path] = dict.fromkeys(Stage, NO)
    return found


def test_it_is_fresh_and_writing_it_again_changes_nothing(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert f"{BEGIN}\n\n{table()}\n\n{END}" in text, "run `make generate`"
    copy = tmp_path / PAGE.name
    copy.write_text(text, encoding="utf-8")
    write_into(copy)
    assert copy.read_text(encoding="utf-8") == text


def test_it_has_every_field() -> None:
    assert rows().keys() == FIELDS.keys()


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_what_it_says_holds_for_every_value(field: SpecField) -> None:
    """Not just for one: `yes` is each other value's effect, `no` is none's, in every case."""
    usual = measure(field, USUAL)
    special = {words: measure(field, case) for words, case in CASES.items()}
    for stage, said in rows()[field.path].items():
        effects = [stage in stages for stages in usual]
        seen = {words for words, found in special.items() if any(stage in each for each in found)}
        if said.startswith(YES):
            assert all(effects)
            assert said == YES or said.removeprefix(f"{YES}, but not ") not in seen
        elif said in CASES:
            assert not any(effects)
            assert said in seen
        else:
            assert said == NO or said in INDIRECT.values()
            assert not any(effects)
            assert not seen


@pytest.mark.parametrize(
    ("path", "cells"),
    [
        ("dataset.format", ("yes", "where the examples differ", "where the examples differ")),
        ("training.maxSequenceLength", ("yes", "where rows are cut", "yes")),
        ("training.packing", ("no", "no", "no")),
        ("training.learningRate", ("no", "yes", "yes")),
        ("export.gguf", ("no", "no", "yes")),
        ("stages", ("no", "no", "no")),
    ],
)
def test_it_says_what_people_rely_on(path: str, cells: tuple[str, ...]) -> None:
    assert tuple(rows()[path].values()) == cells
