"""What a folder promises, on disk and in each S3 server."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from finetune_trainer.contract import Storage
from finetune_trainer.store import Folder, LocalFolder, open_folder
from tests.integration.trainer.conftest import ALL_STORES, keys_of, use_keys

BUCKET = "contract"


@pytest.fixture(params=["disk", *ALL_STORES])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "disk":
        return LocalFolder(tmp_path / "store")
    keys = keys_of(request, request.param)
    use_keys(keys, request.getfixturevalue("monkeypatch"))
    client = keys.client()
    if BUCKET not in {each["Name"] for each in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=BUCKET)
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return open_folder(f"s3://{BUCKET}/{name}", Storage(endpoint=keys.endpoint))


def test_a_file_is_created_once(folder: Folder) -> None:
    assert folder.create("a/owner.json", b"first")
    assert not folder.create("a/owner.json", b"second")
    assert not folder.create("a/owner.json", b"first"), "it was there"
    assert folder.read("a/owner.json") == b"first"
    folder.write("a/owner.json", b"third")
    assert folder.read("a/owner.json") == b"third"
    folder.delete(["a/owner.json"])
    assert folder.create("a/owner.json", b"fourth")
    assert [info.path for info in folder.list()] == ["a/owner.json"]


def test_of_several_who_create_one_wins(folder: Folder) -> None:
    together = threading.Barrier(6)

    def claim(number: int) -> bool:
        together.wait()
        return folder.create("owner.json", b"%d" % number)

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(claim, range(6)))
    assert won.count(True) == 1
    assert folder.read("owner.json") == b"%d" % won.index(True)


def test_files_are_written_listed_read_copied_and_deleted(folder: Folder, tmp_path: Path) -> None:
    folder.write("a/b/c.json", b"{}")
    folder.write("a/d.json", b"[1]")
    listed = [(info.path, info.size) for info in folder.list("a/")]
    assert listed == [("a/b/c.json", 2), ("a/d.json", 3)]
    info = folder.stat("a/d.json")
    assert info is not None
    assert info.size == 3
    assert folder.read_start("a/d.json", 2) == b"[1"
    assert folder.read("nothing") is None
    assert folder.stat("nothing") is None
    with pytest.raises(FileNotFoundError, match="nothing"):
        folder.download("nothing", tmp_path / "target")
    folder.delete(["a/b/c.json", "a/never-was.json"])
    assert [info.path for info in folder.list()] == ["a/d.json"]


def test_a_large_file_goes_in_parts_and_comes_back(folder: Folder, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom((20 << 20) + 5))
    up: list[int] = []
    down: list[int] = []
    folder.upload(source, "big.bin", up.append)
    folder.download("big.bin", tmp_path / "copy", down.append)
    assert sum(up) == sum(down) == source.stat().st_size
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
