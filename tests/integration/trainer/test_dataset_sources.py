"""Datasets on the Hub and in several objects of a store, by the real clients over HTTP."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_trainer.contract import Dataset, Reason, StageError, Storage
from finetune_trainer.prepare.dataset_files import DataFile, DatasetRows, find_data_files
from finetune_trainer.runtime.reporter import Reporter
from hack.object_store import Credentials
from tests.integration.trainer.conftest import Trainer, use_keys
from tests.integration.trainer.hub_server import COMMIT, hub_server

SOURCE = "hf://datasets/public/rows"
LATER = COMMIT[::-1]


def write_parquet(file: Path, *questions: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"question": list(questions), "answer": [f"To {q}" for q in questions]})
    pq.write_table(table, file)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A dataset as they are on the Hub: shards of a train split beside a test split."""
    folder = tmp_path / "repository"
    write_parquet(folder / "data" / "train-00000-of-00002.parquet", "a?", "b?")
    write_parquet(folder / "data" / "train-00001-of-00002.parquet", "c?")
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", "d?")
    (folder / "README.md").write_text("# Rows")
    return folder


@contextmanager
def on_hub(monkeypatch: pytest.MonkeyPatch, folder: Path, commit: str = COMMIT) -> Iterator[None]:
    with hub_server(folder, commit) as endpoint:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield


def find(source: str = SOURCE) -> DataFile:
    return find_data_files(Dataset(source=source), Storage()).rows


def files_of(found: DataFile) -> list[str]:
    return [info.path for info in found.infos]


def read(found: DataFile, tmp_path: Path) -> DatasetRows:
    rows = DatasetRows(found, tmp_path / "fetched")
    assert found.fetch(tmp_path / "fetched", Reporter())
    rows.load(Dataset(source=found.uri), 0)
    return rows


def questions_of(rows: DatasetRows) -> list[str]:
    return [example["prompt"][0]["content"] for example in rows.examples()]


def test_the_train_split_is_found_and_pinned(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with on_hub(monkeypatch, repository):
        rows = read(find(), tmp_path)
    assert questions_of(rows) == ["a?", "b?", "c?"]
    assert rows.shards
    assert [(shard.uri, shard.rows) for shard in rows.shards] == [
        (f"{SOURCE}@{COMMIT}/data/train-00000-of-00002.parquet", 2),
        (f"{SOURCE}@{COMMIT}/data/train-00001-of-00002.parquet", 1),
    ]
    assert all(shard.etag.startswith("sha256:") for shard in rows.shards)
    assert not list(tmp_path.rglob("*.hub"))


def test_a_commit_that_changes_only_the_readme_changes_no_etag(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with on_hub(monkeypatch, repository):
        first = find().info.etag
    (repository / "README.md").write_text("# Other words")
    write_parquet(repository / "data" / "test-00000-of-00001.parquet", "other?")
    with on_hub(monkeypatch, repository, LATER):
        second = find()
    assert second.info.etag == first
    assert LATER in second.folder.uri_of("data")
    write_parquet(repository / "data" / "train-00001-of-00002.parquet", "other?")
    with on_hub(monkeypatch, repository, LATER):
        assert find().info.etag != first


@pytest.mark.parametrize(
    ("path", "files"),
    [
        ("/data/test-00000-of-00001.parquet", ["data/test-00000-of-00001.parquet"]),
        (f"@{COMMIT}/data/test-*", ["data/test-00000-of-00001.parquet"]),
        ("@main/data", ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]),
        ("@refs/convert/parquet/**/*1-of-00002.parquet", ["data/train-00001-of-00002.parquet"]),
        ("@refs%2Fconvert%2Fparquet/data/*00.parquet", []),
    ],
)
def test_a_path_names_a_file_a_folder_or_a_pattern(
    repository: Path, monkeypatch: pytest.MonkeyPatch, path: str, files: list[str]
) -> None:
    with on_hub(monkeypatch, repository):
        if files:
            assert files_of(find(SOURCE + path)) == files
            return
        with pytest.raises(StageError, match="There is no such file at") as caught:
            find(SOURCE + path)
    assert "it has 'data/test-00000-of-00001.parquet'" in caught.value.message


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["train.jsonl", "test.jsonl"], ["train.jsonl"]),
        (["rows.csv", "README.md"], ["rows.csv"]),
        (["rows-1.json.gz", "rows-2.json.gz"], ["rows-1.json.gz", "rows-2.json.gz"]),
        (["main/train/0.parquet", "main/test/0.parquet"], ["main/train/0.parquet"]),
        (["train-00000-of-00001-a3ecdf2b7bd9f7f8.parquet"], None),
        (["main/train-00000-of-00001.parquet", "socratic/train-00000-of-00001.parquet"], []),
        (["data/train_sft-00000-of-00001.parquet", "data/train_gen-00000-of-00001.parquet"], []),
        (["train.csv", "train.parquet"], []),
        (["test.csv", "validation.csv"], []),
        (["a.csv", "b.csv"], []),
        (["README.md", "rows.py"], []),
    ],
    ids=lambda value: ",".join(value) if value else "",
)  # fmt: skip
def test_the_files_to_train_on_are_found_or_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], chosen: list[str] | None
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"rows")
    with on_hub(monkeypatch, tmp_path):
        if chosen != []:
            assert files_of(find()) == (chosen or files)
            return
        with pytest.raises(StageError) as caught:
            find()
    assert caught.value.reason is Reason.DATASET_NOT_FOUND
    data = [name for name in files if not name.endswith((".md", ".py"))]
    assert all(name in caught.value.message for name in data)
    assert "spec.dataset.source" in caught.value.message


@pytest.mark.parametrize(
    ("source", "reason", "said"),
    [
        ("hf://datasets/public/none", Reason.DATASET_NOT_FOUND, "does not exist on the Hub"),
        ("hf://datasets/public/rows@v9", Reason.DATASET_NOT_FOUND, "no revision 'v9'"),
        ("hf://datasets/broken/rows", Reason.MODEL_HUB_UNAVAILABLE, "HTTP 503"),
        ("hf://datasets/public", Reason.INVALID_CONFIG, "write hf://datasets/org/name"),
    ],
)
def test_a_dataset_that_can_not_be_had(
    repository: Path, monkeypatch: pytest.MonkeyPatch, source: str, reason: Reason, said: str
) -> None:
    with on_hub(monkeypatch, repository), pytest.raises(StageError, match=said) as caught:
        find(source)
    assert caught.value.reason is reason


def test_a_gated_dataset_names_the_token(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with on_hub(monkeypatch, repository):
        found = find("hf://datasets/gated/rows")
        with pytest.raises(StageError, match=r"is gated: .* spec.model.tokenSecretRef") as caught:
            found.fetch(tmp_path / "fetched", Reporter())
    assert caught.value.reason is Reason.STORAGE_ACCESS_DENIED


def test_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StageError, match="HF_ENDPOINT") as caught:
        find()
    assert caught.value.reason is Reason.MODEL_HUB_UNAVAILABLE


def parquet(*questions: str) -> bytes:
    stream = io.BytesIO()
    columns = {"question": list(questions), "answer": [f"To {q}" for q in questions]}
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


@pytest.fixture
def shards(moto: Credentials, bucket: str) -> str:
    """Two objects with rows and one without, in a folder of a bucket."""
    client = moto.client()
    for name, body in {
        "part-1.parquet": parquet("a?", "b?"),
        "part-0.parquet": parquet("c?"),
        "_SUCCESS": b"",
        "deeper/part-9.parquet": parquet("z?"),
    }.items():
        client.put_object(Bucket=bucket, Key=f"shards/{name}", Body=body)
    return f"s3://{bucket}/shards"


def test_objects_are_read_as_one_dataset(
    moto: Credentials, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_keys(moto, monkeypatch)
    storage = Storage(endpoint=moto.endpoint)
    for pattern in ("/", "/*.parquet", "/part-[01].parquet"):
        found = find_data_files(Dataset(source=shards + pattern), storage).rows
        assert files_of(found) == ["part-0.parquet", "part-1.parquet"]
    rows = read(found, tmp_path)
    assert questions_of(rows) == ["c?", "a?", "b?"]
    assert rows.shards
    assert [shard.uri for shard in rows.shards] == [
        f"{shards}/part-0.parquet", f"{shards}/part-1.parquet",
    ]  # fmt: skip
    deep = find_data_files(Dataset(source=f"{shards}/**/*.parquet"), storage).rows
    assert files_of(deep) == ["deeper/part-9.parquet", "part-0.parquet", "part-1.parquet"]


def test_prepare_reads_a_folder_and_held_out_rows_of_the_hub(
    trainer: Trainer,
    run_config: dict[str, Any],
    moto: Credentials,
    shards: str,
    repository: Path,
) -> None:
    """The whole stage: the ETag, the report with each file, and nothing to do the second time."""
    run_config["export"] = {"gguf": []}
    with hub_server(repository) as endpoint:
        trainer.environment["HF_ENDPOINT"] = endpoint
        run_config["dataset"] = {"source": f"{shards}/", "evalSource": SOURCE}
        first = trainer("prepare", run_config)
        again = trainer("prepare", run_config)
    assert first.result is not None, first.output
    assert first.result.reason is Reason.SUCCEEDED, first.result.message
    assert first.result.resolved is not None
    assert first.result.resolved.dataset_etag.startswith("sha256:")
    assert (first.result.resolved.dataset_rows, first.result.resolved.eval_rows) == (3, 3)
    out, _, prefix = run_config["output"]["uri"].removeprefix("s3://").partition("/")
    key = f"{prefix}/stages/prepare/{first.result.resolved.fingerprints.prepare}"
    stored = moto.client().get_object(Bucket=out, Key=f"{key}/dataset-report.json")
    report = json.loads(stored["Body"].read())
    etags = {
        item["Key"].rpartition("/")[2]: item["ETag"].strip('"')
        for item in moto.client().list_objects_v2(Bucket=shards.split("/")[2], Prefix="shards/")[
            "Contents"
        ]
    }
    assert report["shards"] == [
        {"uri": f"{shards}/{name}", "etag": etags[name], "rows": rows}
        for name, rows in (("part-0.parquet", 1), ("part-1.parquet", 2))
    ]
    assert report["evalSource"]["shards"][0]["uri"].startswith(f"{SOURCE}@{COMMIT}/data/train-")
    assert again.result is not None
    assert "prepare" in again.result.complete
