"""Folders on disk."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from finetune_trainer.contract import Reason, StageError, Storage
from finetune_trainer.store import PARTIAL, Folder, open_folder, split


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return open_folder(str(tmp_path / "store"), Storage())


def test_files_are_written_listed_read_and_deleted(folder: Folder, tmp_path: Path) -> None:
    folder.write("a/b/c.json", b"{}")
    folder.write("a/d.json", b"[1]")
    assert [(info.path, info.size) for info in folder.list("a/")] == [
        ("a/b/c.json", 2),
        ("a/d.json", 3),
    ]
    assert [info.path for info in folder.list("a/b")] == ["a/b/c.json"]
    assert folder.read("a/d.json") == b"[1]"
    folder.delete(["a/b/c.json", "a/never-was.json"])
    assert [info.path for info in folder.list()] == ["a/d.json"]
    assert not (tmp_path / "store" / "a" / "b").exists()


def test_what_is_missing_is_none(folder: Folder, tmp_path: Path) -> None:
    assert folder.stat("nothing") is None
    assert folder.read("nothing") is None
    assert folder.list("nothing/") == []
    with pytest.raises(FileNotFoundError):
        folder.download("nothing", tmp_path / "target")


def test_the_etag_is_the_content(folder: Folder) -> None:
    folder.write("data.csv", b"abc")
    info = folder.stat("data.csv")
    assert info is not None
    assert info.etag == "sha256:" + hashlib.sha256(b"abc").hexdigest()


def test_copies_say_how_far_they_are(folder: Folder, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(5 << 20))
    moved: list[int] = []
    folder.upload(source, "big.bin", moved.append)
    folder.download("big.bin", tmp_path / "copy")
    assert sum(moved) == 5 << 20
    assert len(moved) > 1
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


def test_a_broken_write_leaves_nothing(folder: Folder, tmp_path: Path) -> None:
    folder.write("kept", b"old")
    with pytest.raises(FileNotFoundError):
        folder.upload(tmp_path / "never-was", "kept")
    assert folder.read("kept") == b"old"
    assert [info.path for info in folder.list()] == ["kept"]


def test_a_file_in_the_way_is_an_access_error(folder: Folder) -> None:
    folder.write("file", b"")
    with pytest.raises(StageError) as caught:
        folder.write("file/below", b"")
    assert caught.value.reason is Reason.STORAGE_ACCESS_DENIED
    assert "file/below" in caught.value.message


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://bucket/a/b.csv", ("s3://bucket/a", "b.csv")),
        ("s3://bucket/b.csv", ("s3://bucket", "b.csv")),
        ("/data/b.csv", ("/data", "b.csv")),
    ],
)
def test_a_uri_is_folder_and_name(uri: str, expected: tuple[str, str]) -> None:
    assert split(uri) == expected


def test_a_file_system_without_hard_links_creates_in_place(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert folder.create("owner", b"first")
    assert not folder.create("owner", b"second")
    assert folder.read("owner") == b"first"


def test_a_file_that_is_not_what_was_written_is_not_copied(folder: Folder, tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(b"12345")
    sha256 = hashlib.sha256(b"12345").hexdigest()
    folder.upload(source, "a", sha256=sha256)
    source.write_bytes(b"12344")
    with pytest.raises(StageError, match=r"model\.gguf is not what was written"):
        folder.upload(source, "b", sha256=sha256)
    assert [info.path for info in folder.list()] == ["a"]


def test_partial_files_of_a_killed_process_can_be_dropped(folder: Folder, tmp_path: Path) -> None:
    for name in ("stages/x", "other"):
        (tmp_path / "store" / name).mkdir(parents=True)
        (tmp_path / "store" / name / f"{PARTIAL}0-a").write_bytes(b"123")
    folder.abandon("stages/")
    left = [p.relative_to(tmp_path / "store") for p in (tmp_path / "store").rglob("*")]
    assert [path.as_posix() for path in sorted(left)] == ["other", f"other/{PARTIAL}0-a"]


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the kernel, in order.

    Whether bytes survive a crash can't be seen without one, and no tracer is at hand. So the two
    calls are noted here, and still made.
    """
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        kind = "folder" if path.is_dir() else "bytes"
        name = path.name.partition("-")[0] if path.name.startswith(PARTIAL) else path.name
        calls.append(f"{kind} of {name}")
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        calls.append(f"rename to {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return calls


def test_a_file_is_on_the_disk_before_the_marker_that_lists_it(
    folder: Folder, tmp_path: Path, on_disk: list[str]
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"12345")
    folder.write("first", b"makes the folder")
    on_disk.clear()
    folder.upload(source, "adapter/weights")
    folder.write("complete.json", b"{}")
    assert folder.create("owner", b"me")
    partial = PARTIAL.rstrip("-")
    assert on_disk == [
        "folder of store",  # that has the name of adapter/
        f"bytes of {partial}",
        "rename to weights",
        "folder of adapter",
        f"bytes of {partial}",
        "rename to complete.json",
        "folder of store",
        f"bytes of {partial}",
        "folder of store",
    ]


def test_what_is_downloaded_to_work_with_waits_for_no_disk(
    folder: Folder, tmp_path: Path, on_disk: list[str]
) -> None:
    folder.write("a", b"1")
    on_disk.clear()
    folder.download("a", tmp_path / "work" / "a")
    assert on_disk == ["folder of " + tmp_path.name, "rename to a"]
