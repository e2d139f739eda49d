"""Buckets, by the storage interface."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune_trainer.contract import Reason, Stage, StageError, Storage
from finetune_trainer.store import Folder, open_folder
from finetune_trainer.store.marker import find_complete, save_stage
from hack.object_store import Credentials


@pytest.fixture
def folder(moto: Credentials, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", moto.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", moto.secret_key)
    folder = open_folder(f"s3://{bucket}/storage", Storage(endpoint=moto.endpoint))
    folder.delete([info.path for info in folder.list()])
    return folder


def test_objects_are_written_listed_read_and_deleted(folder: Folder) -> None:
    folder.write("a/b/c.json", b"{}")
    folder.write("a/d.json", b"[1]")
    assert [(info.path, info.size) for info in folder.list("a/")] == [
        ("a/b/c.json", 2),
        ("a/d.json", 3),
    ]
    info = folder.stat("a/d.json")
    assert info is not None
    assert info == folder.list("a/d")[0]
    assert folder.read("a/d.json") == b"[1]"
    folder.delete(["a/b/c.json", "a/never-was.json"])
    assert [info.path for info in folder.list()] == ["a/d.json"]


def test_a_large_file_goes_in_parts_and_says_how_far_it_is(folder: Folder, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(20 << 20))
    up: list[int] = []
    down: list[int] = []
    folder.upload(source, "big.bin", up.append)
    folder.download("big.bin", tmp_path / "copy", down.append)
    assert sum(up) == sum(down) == 20 << 20
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_missing_object_is_none_and_a_missing_bucket_is_not(
    folder: Folder, moto: Credentials, tmp_path: Path
) -> None:
    assert folder.stat("nothing") is None
    assert folder.read("nothing") is None
    with pytest.raises(FileNotFoundError, match="s3://trainer-bucket/storage/nothing is missing"):
        folder.download("nothing", tmp_path / "target")
    elsewhere = open_folder("s3://nowhere/x", Storage(endpoint=moto.endpoint))
    for ask in (lambda: elsewhere.stat("a"), lambda: elsewhere.read("a"), elsewhere.list):
        with pytest.raises(StageError) as caught:
            ask()
        assert caught.value.reason is Reason.BUCKET_NOT_FOUND


def test_the_endpoint_may_come_with_the_keys(
    folder: Folder, moto: Credentials, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write("here", b"yes")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto.endpoint)
    assert open_folder(f"s3://{bucket}/storage", Storage()).read("here") == b"yes"


def test_a_stage_counts_when_its_marker_and_all_its_files_are_there(
    folder: Folder, tmp_path: Path
) -> None:
    result = tmp_path / "result"
    (result / "adapter").mkdir(parents=True)
    (result / "adapter" / "weights").write_bytes(b"12345")
    (result / "metrics.json").write_bytes(b"{}")
    assert find_complete(folder, Stage.TRAIN, "fp") is None
    save_stage(folder, Stage.TRAIN, "fp", result)
    marker = find_complete(folder, Stage.TRAIN, "fp")
    assert marker is not None
    assert [(item.path, item.bytes) for item in marker.files] == [
        ("adapter/weights", 5),
        ("metrics.json", 2),
    ]
    assert find_complete(folder, Stage.TRAIN, "other") is None
    folder.write("stages/train/fp/adapter/weights", b"1234")
    assert find_complete(folder, Stage.TRAIN, "fp") is None
    folder.write("stages/train/fp/complete.json", b"not JSON")
    assert find_complete(folder, Stage.TRAIN, "fp") is None
