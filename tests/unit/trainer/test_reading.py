"""The dataset reader on a corpus of odd and broken files: each ends as its table says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from finetune_trainer.contract import Dataset, StageError
from finetune_trainer.prepare.reading import Problems, Record, open_source, read_records
from finetune_trainer.prepare.split import repeated, row_hash

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
