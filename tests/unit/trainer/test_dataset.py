"""The CSV reader: what it accepts, and what it says about what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_trainer.config import Columns
from finetune_trainer.outcome import Reason, StageError
from finetune_trainer.prepare.dataset import read_csv

CSV = Path(__file__).parents[2] / "data" / "csv"
URI = "s3://data/train.csv"


def read(name: str, columns: Columns | None = None) -> list[tuple[int, str, str]]:
    rows = read_csv(CSV / name, columns or Columns(), URI)
    return [(row.number, row.instruction, row.response) for row in rows]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("good.csv", [(2, "What is 2+2?", "4"), (3, "Name a colour.", "Blue")]),
        ("bom-and-windows-lines.csv", [(2, "Hello", "Hi"), (3, "Bye", "See you")]),
        (
            "quoted-newlines.csv",
            [(2, "Write\ntwo lines, please", 'one "quoted" word\nand another')],
        ),
        (
            "words-that-are-not-missing.csv",
            [
                (2, "Is it there?", "NA"),
                (3, "What is it?", "null"),
                (4, "Which number?", "0012"),
                (5, "True?", "None"),
            ],
        ),
        ("blank-lines.csv", [(3, "Who?", "Me"), (6, "When?", "Now")]),
    ],
)
def test_what_is_read(name: str, expected: list[tuple[int, str, str]]) -> None:
    assert read(name) == expected


def test_other_columns_are_mapped() -> None:
    columns = Columns(instruction="question", response="answer")
    assert read("more-columns.csv", columns) == [(2, "Who?", "Me"), (3, "When?", "Now")]


@pytest.mark.parametrize(
    ("name", "reason", "parts"),
    [
        ("empty.csv", Reason.DATASET_EMPTY, ["is empty", "header row"]),
        ("only-a-bom.csv", Reason.DATASET_EMPTY, ["is empty"]),
        ("header-only.csv", Reason.DATASET_EMPTY, ["'instruction', 'response'", "no rows"]),
        (
            "other-header.csv",
            Reason.COLUMN_NOT_FOUND,
            ["no column 'instruction'", "'Instruction', 'Answer'", "Did you mean 'Instruction'?"],
        ),
        ("semicolons.csv", Reason.COLUMN_NOT_FOUND, ["not to be separated by commas"]),
        ("same-column-twice.csv", Reason.COLUMN_NOT_FOUND, ["'response' 2 times"]),
        (
            "blank-cells.csv",
            Reason.INVALID_ROWS,
            [
                "3 bad rows",
                "row 3: 'response' is blank",
                "row 4: 'instruction' is blank",
                "row 5: 'response' is blank",
            ],
        ),
        (
            "ragged.csv",
            Reason.INVALID_ROWS,
            ["row 3: 3 cells where the header has 2", "row 4: 1 cell where"],
        ),
        ("twelve-bad-rows.csv", Reason.INVALID_ROWS, ["12 bad rows", "row 11:", "and 2 more"]),
        ("open-quote.csv", Reason.INVALID_ROWS, ["row 3: a quote is opened and never closed"]),
        ("broken-quote.csv", Reason.INVALID_ROWS, ["row 3: ',' expected after '\"'"]),
        ("latin-1.csv", Reason.DATASET_UNREADABLE, ["byte 28 (0xeb)", "UTF-8"]),
        ("utf-16.csv", Reason.DATASET_UNREADABLE, ["UTF-16 text", "UTF-8"]),
        ("null-byte.csv", Reason.DATASET_UNREADABLE, ["byte 27 (0x00)"]),
        ("spreadsheet.csv", Reason.DATASET_UNREADABLE, ["a spreadsheet or zip archive"]),
    ],
)
def test_what_is_refused(name: str, reason: Reason, parts: list[str]) -> None:
    with pytest.raises(StageError) as caught:
        read(name)
    assert caught.value.reason is reason
    for part in [URI, *parts]:
        assert part in caught.value.message
    assert caught.value.reason.exit_code == 10


def test_a_long_cell_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "long.csv"
    text = "word " * 100_000
    file.write_text(f'instruction,response\nWho?,"{text}"\n', encoding="utf-8")
    assert read_csv(file, Columns(), URI)[0].response == text
