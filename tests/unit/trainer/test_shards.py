"""Datasets of several files: which belong to one, and rows that are named with their file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_trainer.contract import (
    Dataset,
    DatasetReport,
    PreparedRunConfig,
    Reason,
    RunConfig,
    StageError,
    Storage,
    TrainingRecord,
)
from finetune_trainer.export.export_stage import lineage_of
from finetune_trainer.prepare.dataset_files import DataFile, DatasetRows, find_data_files
from finetune_trainer.prepare.findings import Findings
from finetune_trainer.prepare.shards import fits
from finetune_trainer.runtime.reporter import Reporter

HEADER = "instruction,response\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files of rows in `data`, with what else lies in such folders."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "part-2.csv").write_text(HEADER + "Where?,Here\nWho?,Me\n")
    (data / "part-1.csv").write_text(HEADER + "Who?,Me\nWhen?,\n,,\nHow?,So\n")
    (data / "part-3.csv").write_bytes(b"")
    (data / "_SUCCESS").write_bytes(b"")
    (data / ".part-1.csv.crc").write_bytes(b"crc")
    (data / "README.md").write_text("# Rows")
    return data


def find(source: str, **fields: Any) -> DataFile:
    dataset = Dataset.model_validate({"source": source, **fields})
    return find_data_files(dataset, Storage()).rows


def read(source: str, tmp_path: Path, **fields: Any) -> Findings:
    dataset = {"source": source, "onInvalidRow": "skip", "maxInvalidRows": "50%", **fields}
    config = RunConfig.model_validate(
        {"model": {"source": "/model"}, "dataset": dataset, "output": {"uri": "/out"}}
    )
    rows = DatasetRows(find(source), tmp_path / "fetched")
    assert rows.file.fetch(tmp_path / "fetched", Reporter(None))
    findings = Findings(config, rows)
    rows.load(config.dataset, 0)
    return findings


@pytest.mark.parametrize("pattern", ["data/", "data/*.csv", "**/part-[0-9].csv", "d?ta/part-*"])
def test_files_are_read_in_the_order_of_their_names(
    folder: Path, tmp_path: Path, pattern: str
) -> None:
    findings = read(f"{folder.parent}/{pattern}", tmp_path)
    rows = findings.rows
    answers = [example["completion"][0]["content"] for example in rows.examples()]
    assert answers == ["Me", "So", "Here", "Me"]
    assert [Path(uri).name for _, uri in rows.file.locals(tmp_path)] == [
        "part-1.csv", "part-2.csv", "part-3.csv",
    ]  # fmt: skip


def test_rows_are_named_with_their_file(folder: Path, tmp_path: Path) -> None:
    findings = read(f"{folder}/", tmp_path)
    rows = findings.rows
    (bad,) = rows.problems
    assert (bad.file, bad.row, bad.cause) == ("part-1.csv", 3, "'response' is blank")
    assert rows.problems.describe("row") == "1 bad row. 'part-1.csv' row 3: 'response' is blank"
    assert [rows.name_of(n) for n in rows.numbers.tolist()] == [
        "part-1.csv:2", "part-1.csv:5", "part-2.csv:2", "part-2.csv:3",
    ]  # fmt: skip
    (tmp_path / "out").mkdir()
    findings.write(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "dataset-report.json").read_text())
    assert report["invalidRows"] == [
        {"file": "part-1.csv", "row": 3, "cause": "'response' is blank"}
    ]
    assert report["duplicates"] == {"count": 1, "files": {"part-2.csv": [3]}}
    assert [Path(shard["uri"]).name for shard in report["shards"]] == [
        "part-1.csv", "part-2.csv", "part-3.csv",
    ]  # fmt: skip
    assert [shard["rows"] for shard in report["shards"]] == [3, 2, 0]
    assert all(shard["etag"].startswith("sha256:") for shard in report["shards"])
    assert (report["rows"], report["invalid"], report["blankRows"]) == (5, 1, 1)
    assert findings.summary().first_invalid[0].file == "part-1.csv"


def test_the_etag_is_one_over_all_files(folder: Path) -> None:
    before = find(f"{folder}/").info
    assert before.etag.startswith("sha256:")
    assert find(f"{folder}/").info.etag == before.etag
    (folder / "README.md").write_text("# Other words")
    assert find(f"{folder}/").info.etag == before.etag
    (folder / "part-2.csv").write_text(HEADER + "Where?,There\nWho?,Me\n")
    assert find(f"{folder}/").info.etag != before.etag


def test_a_single_file_keeps_its_own_etag_and_numbers(folder: Path, tmp_path: Path) -> None:
    findings = read(f"{folder}/part-1.csv", tmp_path)
    rows = findings.rows
    assert rows.file.info == rows.file.infos[0]
    assert rows.shards is None
    assert rows.numbers.tolist() == [2, 5]
    assert rows.listed(np.array([True, True])).model_dump(exclude_none=True) == {
        "count": 2, "rows": [2, 5],
    }  # fmt: skip


def test_a_name_may_look_like_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "rows[1].csv").write_text(HEADER + "Who?,Me\n")
    assert not find(f"{tmp_path}/rows[1].csv").several


def test_a_file_that_changes_meanwhile_is_noticed(folder: Path, tmp_path: Path) -> None:
    found = find(f"{folder}/")
    (folder / "part-2.csv").write_text(HEADER + "Other?,Row\n")
    assert not found.fetch(tmp_path / "fetched", Reporter(None))
    (folder / "part-2.csv").unlink()
    assert not found.fetch(tmp_path / "fetched", Reporter(None))


def test_files_of_two_layouts_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "part-4.csv").write_text("question,answer\nWho?,Me\n")
    with pytest.raises(
        StageError, match="must have the same format and the same columns"
    ) as caught:
        read(f"{folder}/", tmp_path)
    assert caught.value.reason is Reason.DATASET_UNREADABLE
    assert "part-4.csv has the columns 'question', 'answer' where" in caught.value.message


def test_files_of_two_formats_are_refused(folder: Path, tmp_path: Path) -> None:
    table = pa.table({"instruction": ["Who?"], "response": ["Me"]})
    pq.write_table(table, folder / "part-4.parquet")
    with pytest.raises(StageError, match=r"part-4.parquet has parquet where .*part-1.csv has csv"):
        read(f"{folder}/", tmp_path)


def test_spelling_and_optional_keys_may_differ(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Instruction,RESPONSE\nWho?,Me\n")
    (tmp_path / "b.csv").write_text("response,note,instruction\nNow,x,When?\n")
    rows = read(f"{tmp_path}/*.csv", tmp_path).rows
    assert [e["completion"][0]["content"] for e in rows.examples()] == ["Me", "Now"]
    (tmp_path / "a.jsonl").write_text('{"instruction": "Who?", "output": "Me"}\n')
    (tmp_path / "b.jsonl").write_text('{"instruction": "When", "input": "is it?", "output": "1"}\n')
    rows = read(f"{tmp_path}/*.jsonl", tmp_path).rows
    assert [e["prompt"][0]["content"] for e in rows.examples()] == ["Who?", "When\n\nis it?"]


def test_a_bad_file_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "part-2.csv").write_text(HEADER + 'Who?,"never closed\n')
    with pytest.raises(StageError) as caught:
        read(f"{folder}/", tmp_path, onInvalidRow="fail")
    assert "'part-2.csv' row 2: a quote is opened and never closed" in caught.value.message
    assert f"From row 2 of {folder}/part-2.csv on" in caught.value.message
    (folder / "part-2.csv").write_bytes(HEADER.encode() + b"Who?,Zo\xeb\n")
    with pytest.raises(StageError, match=r"part-2.csv is not UTF-8 text"):
        read(f"{folder}/", tmp_path)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("data/*.parquet", "There are no CSV, JSON lines or Parquet files at"),
        ("docs/", "it holds 'README.md'"),
        ("nowhere/", "There are no CSV"),
        ("data", "There is a folder of that name: write"),
        ("nothing.csv", "There is no dataset at"),
    ],
)
def test_what_is_not_there_is_said(folder: Path, tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text("# Rows")
    with pytest.raises(StageError, match=said) as caught:
        find(f"{folder.parent}/{source}")
    assert caught.value.reason is Reason.DATASET_NOT_FOUND


@pytest.mark.parametrize(
    ("pattern", "path", "fit"),
    [
        ("*.csv", "a.csv", True),
        ("*.csv", "b/a.csv", False),
        ("**/*.csv", "a.csv", True),
        ("**/*.csv", "b/c/a.csv", True),
        ("b/**", "b/c/a.csv", True),
        ("part-[0-9].csv", "part-x.csv", False),
        ("part-?.csv", "part-12.csv", False),
    ],
)
def test_patterns(pattern: str, path: str, fit: bool) -> None:
    assert fits(path, pattern) is fit


def test_the_lineage_lists_each_file(folder: Path, tmp_path: Path) -> None:
    """From the report that `prepare` left to manifest.json."""
    findings = read(f"{folder}/", tmp_path)
    (tmp_path / "out").mkdir()
    findings.write(tmp_path / "out")
    text = (tmp_path / "out" / "dataset-report.json").read_text()
    resolved = {
        "fingerprints": {"prepare": "p", "train": "t", "export": "e"},
        "datasetETag": findings.rows.file.info.etag,
        "datasetRows": 4,
        "modelRevision": "r",
    }
    config = PreparedRunConfig.model_validate(
        findings.config.model_dump(exclude_none=True) | {"resolved": resolved}
    )
    trained = TrainingRecord.model_validate({"metrics": {}, "hyperparameters": {}})
    lineage = lineage_of(config, trained, DatasetReport.model_validate_json(text))
    assert lineage.dataset_etag == findings.rows.file.info.etag
    assert lineage.dataset_files == findings.rows.shards
    assert lineage.eval_files is None
