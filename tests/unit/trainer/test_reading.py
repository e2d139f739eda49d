"""The dataset reader on a corpus of odd and broken files: each ends as its table says."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from finetune_trainer.contract import Dataset, Reason, StageError
from finetune_trainer.prepare.dataset_files import repeated, row_hash
from finetune_trainer.prepare.reading import Problems, Record
from finetune_trainer.prepare.reading.record import Oddities
from tests.reading import open_source, read_records

DATA = Path(__file__).parents[2] / "data"
CORPUS = DATA / "corpus"
CASES: list[dict[str, Any]] = yaml.safe_load((DATA / "corpus.yaml").read_text(encoding="utf-8"))
URI = "s3://data/train.csv"


def dataset(**fields: Any) -> Dataset:
    return Dataset.model_validate({"source": URI, **fields})


def expected(contents: list[str]) -> list[tuple[str, str]]:
    """Roles by position: an odd number of messages begins with the system's."""
    own = len(contents) % 2
    roles = ["system"] * own + ["user", "assistant"] * (len(contents) // 2)
    return list(zip(roles, contents, strict=True))


def as_pairs(record: Record) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in record.messages]


def test_the_table_names_every_file_of_the_corpus() -> None:
    files = {file.name for file in CORPUS.iterdir()}
    assert files == {case["file"] for case in CASES}
    assert len(files) >= 60


@pytest.mark.parametrize("case", CASES, ids=[f"{case['file']}: {case['why']}" for case in CASES])
def test_a_file_of_the_corpus(case: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "dataset"  # the name tells nothing
    file.write_bytes((CORPUS / case["file"]).read_bytes())
    settings = dataset(**case.get("dataset", {}))
    problems = Problems()
    records: list[Record] = []
    if "reason" in case:
        with pytest.raises(StageError) as caught:
            records.extend(read_records(file, settings, URI, problems))
        check_error(case, caught.value, problems)
    else:
        source = open_source(file, settings, URI)
        records.extend(source.records(problems))
        found = source.detected.model_dump(mode="json", exclude_none=True)
        summary = source.summary(problems)
        assert found | case.get("detected", {}) == found
        assert len(records) + problems.count == summary.rows == case.get("rows", summary.rows)
        hashes = np.array([row_hash(record.messages, 0) for record in records], dtype=np.uint64)
        oddities = {key: n for key, n in vars(source.oddities or Oddities()).items() if n}
        if "oddities" in case:
            assert oddities == case["oddities"]
        if "duplicates" in case:
            assert int(np.count_nonzero(repeated(hashes))) == case["duplicates"]
    check_bad_rows(case, problems)
    if "records" in case:
        wanted = {number: expected(contents) for number, contents in case["records"].items()}
        assert {record.number: as_pairs(record) for record in records} == wanted


def check_error(case: dict[str, Any], error: StageError, problems: Problems) -> None:
    assert error.reason == case["reason"]
    assert error.reason.exit_code in (10, 11)
    assert "\n" not in error.message
    assert len(error.message) < 3000
    about_file = [] if case["reason"] == "InvalidConfig" else [URI]
    for part in [*about_file, *case.get("message", [])]:
        assert part in error.message
    if case["reason"] == "InvalidRows":
        assert error.dataset is not None
        assert error.dataset.invalid == problems.count
        assert list(error.dataset.first_invalid) == problems.first
        assert error.dataset.rows == case.get("rows", error.dataset.rows)


def check_bad_rows(case: dict[str, Any], problems: Problems) -> None:
    causes = {bad.row: bad.cause for bad in problems}
    assert list(causes) == list(case.get("bad", {}))
    for row, part in case.get("bad", {}).items():
        assert part in causes[row]
    assert problems.count == len(causes)
    assert problems.first == list(problems)[:10]


def test_many_bad_rows_are_all_kept() -> None:
    problems = Problems()
    for number in range(30_000):
        problems.add(number, f"cause {number} ".ljust(100, "."))
    kept = list(problems)
    assert (problems.count, len(kept), len(problems.first)) == (30_000, 30_000, 10)
    assert kept[-1].row == 29_999
    problems.add(30_000, "after reading them")
    assert sum(1 for _ in problems) == 30_001


def test_a_long_cell_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "long.csv"
    text = "word " * 200_000
    file.write_text(f'instruction,response\nWho?,"{text}"\n', encoding="utf-8")
    (record,) = read_records(file, dataset(), URI, Problems())
    assert record.messages[1]["content"] == text


def test_an_object_of_many_keys_takes_no_longer_than_reading_it(tmp_path: Path) -> None:
    """One of them stands twice. Looking each key up among all would take minutes."""
    file = tmp_path / "wide.jsonl"
    keys = "".join(f'"key {number}": {number}, ' for number in range(200_000))
    file.write_text(
        f'{{{keys}"key 7": 0, "instruction": "Who?", "response": "Me"}}\n'
        f'{{{keys}"instruction": "Who?", "instruction": "What?", "response": "Me"}}\n'
    )
    began = time.process_time()
    problems = Problems()
    mapped = dataset(onInvalidRow="skip", maxInvalidRows=1)
    (record,) = read_records(file, mapped, URI, problems)
    assert time.process_time() - began < 30
    assert as_pairs(record) == [("user", "Who?"), ("assistant", "Me")]
    assert [bad.cause for bad in problems] == ["the key 'instruction' occurs twice"]


def test_objects_of_two_layouts_are_not_mixed(tmp_path: Path) -> None:
    """One line may not decide on how the others are read."""
    file = tmp_path / "mixed.jsonl"
    alpaca = '{"instruction": "Who?", "output": "Me"}\n'
    file.write_text(alpaca * 3 + '{"instruction": "Who?", "output": "Me", "response": "You"}\n')
    with pytest.raises(
        StageError, match="objects with 'instruction', 'output' and others"
    ) as caught:
        open_source(file, dataset(), URI)
    assert caught.value.reason is Reason.DATASET_UNREADABLE
    records = list(read_records(file, dataset(columns={"response": "output"}), URI, Problems()))
    assert [as_pairs(record)[1][1] for record in records] == ["Me"] * 4
