"""Uploads that are cut off, damaged and killed: in the end the store has every byte, or says so."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_trainer.contract import Reason, StageError, Storage
from finetune_trainer.store import Folder, open_folder, s3_upload
from finetune_trainer.store.marker import describe_file
from hack.object_store import Credentials, ObjectStore, object_store
from tests.integration.trainer.conftest import use_keys
from tests.integration.trainer.killing import wait_for
from tests.integration.trainer.s3_proxy import Fault, Proxy, Request, s3_proxy

PART_BYTES = 5 << 20  # the smallest that S3 takes, and moto
SIZE = 5 * PART_BYTES + 12345  # six parts
CHILD = """
import sys
from pathlib import Path
from finetune_trainer.contract import Storage
from finetune_trainer.store import open_folder, parts
parts.PART_BYTES = 5 << 20
uri, endpoint, source = sys.argv[1:]
open_folder(uri, Storage(endpoint=endpoint)).upload(Path(source), "big.bin")
"""


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A store that checks what arrives (moto doesn't)."""
    with object_store(tmp_path_factory.mktemp("store")) as store:
        store.create_bucket("uploads")
        yield store


BOTH = pytest.mark.parametrize("server", ["moto", "weed"], indirect=True)


@pytest.fixture
def server(
    request: pytest.FixtureRequest, moto: Credentials, monkeypatch: pytest.MonkeyPatch
) -> Credentials:
    if getattr(request, "param", "weed") == "moto":
        found = moto
        found.client().create_bucket(Bucket="uploads")
    else:
        found = request.getfixturevalue("weed").credentials
    use_keys(found, monkeypatch)
    monkeypatch.setattr("finetune_trainer.store.parts.PART_BYTES", PART_BYTES)
    monkeypatch.setattr(s3_upload, "ATTEMPTS", 3)
    # Nothing here gets better with time.
    monkeypatch.setattr(s3_upload, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff._MAX_BACKOFF", 0.05)
    return found


@pytest.fixture
def proxy(server: Credentials) -> Iterator[Proxy]:
    with s3_proxy(server.endpoint) as running:
        yield running


@pytest.fixture
def folder(proxy: Proxy, request: pytest.FixtureRequest) -> Folder:
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return open_folder(f"s3://uploads/{name}", Storage(endpoint=proxy.endpoint))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "source.bin"
    file.write_bytes(os.urandom(SIZE))
    return file


def same(folder: Folder, source: Path, tmp_path: Path, path: str = "big.bin") -> bool:
    folder.download(path, tmp_path / "copy")
    return (tmp_path / "copy").read_bytes() == source.read_bytes()


def unfinished(server: Credentials, folder: Folder) -> list[str]:
    """Paths of uploads that were begun, past the proxy."""
    prefix = folder.uri.removeprefix("s3://uploads/") + "/"
    answer = server.client().list_multipart_uploads(Bucket="uploads", Prefix=prefix)
    return [each["Key"].removeprefix(prefix) for each in answer.get("Uploads", [])]


@BOTH
def test_connections_that_are_cut_at_random_bytes_cost_only_what_was_on_its_way(
    folder: Folder, proxy: Proxy, source: Path, tmp_path: Path
) -> None:
    dice = random.Random(7)  # noqa: S311 - no secret
    cuts = 12

    def choose(request: Request) -> Fault | None:
        if request.size < 1000 or proxy.faults >= cuts:
            return None
        return Fault(cut_after=dice.randrange(request.size)) if dice.random() < 0.7 else None

    proxy.choose = choose
    counted: list[int] = []
    folder.upload(source, "big.bin", counted.append, sha256=describe_file(source, "x").sha256)
    assert proxy.faults == cuts
    assert all(each.checked for each in proxy.requests if each.method == "PUT")
    assert sum(counted) == SIZE
    assert same(folder, source, tmp_path)


@BOTH
def test_a_lost_answer_is_asked_for_again(
    folder: Folder, proxy: Proxy, source: Path, tmp_path: Path, server: Credentials
) -> None:
    lost: set[str] = set()

    def choose(request: Request) -> Fault | None:
        kind = "complete" if request.completes else f"part {request.part}"
        if (
            request.part not in (None, 2)
            or kind in lost
            or (request.part is None and kind[0] == "p")
        ):
            return None
        lost.add(kind)
        return Fault(lose_answer=True)

    proxy.choose = choose
    folder.upload(source, "big.bin")
    assert lost == {"part 2", "complete"}
    assert same(folder, source, tmp_path)
    assert unfinished(server, folder) == []


@BOTH
@pytest.mark.parametrize("size", [100_000, SIZE])
def test_a_flipped_bit_is_noticed_and_its_part_sent_again(
    folder: Folder, proxy: Proxy, source: Path, tmp_path: Path, size: int
) -> None:
    source.write_bytes(source.read_bytes()[:size])
    flipped = 3 if size == SIZE else None
    proxy.choose = lambda request: (
        Fault(flip_at=54_321)
        if request.method == "PUT" and request.part == flipped and not proxy.faults
        else None
    )
    counted: list[int] = []
    folder.upload(source, "big.bin", counted.append)
    assert proxy.faults == 1
    assert sum(counted) == size
    sent = [each for each in proxy.requests if each.method == "PUT" and each.part == flipped]
    assert len(sent) == 2
    assert same(folder, source, tmp_path)


def test_a_line_that_always_damages_is_named(folder: Folder, proxy: Proxy, source: Path) -> None:
    proxy.choose = lambda request: Fault(flip_at=5) if request.part == 2 else None
    with pytest.raises(StageError, match=r"does not arrive .* as it was sent") as caught:
        folder.upload(source, "big.bin")
    assert caught.value.reason is Reason.STORAGE_UNAVAILABLE
    assert folder.stat("big.bin") is None


@BOTH
def test_a_killed_process_leaves_parts_that_the_next_one_does_not_send(
    folder: Folder, proxy: Proxy, source: Path, tmp_path: Path, server: Credentials
) -> None:
    held = {4, 5, 6}  # never answered before the process is killed
    proxy.choose = lambda request: Fault(cut_after=1000) if request.part in held else None
    command = [sys.executable, "-c", CHILD, folder.uri, proxy.endpoint, str(source)]
    with subprocess.Popen(command) as child:
        wait_for(lambda: {1, 2, 3, 4} <= set(proxy.parts()), "three parts")
        wait_for(lambda: proxy.passed > 3 * PART_BYTES, "their bytes")
        assert child.poll() is None
        child.kill()
    assert folder.stat("big.bin") is None
    proxy.choose = lambda _: None
    proxy.forget()
    counted: list[int] = []
    folder.upload(source, "big.bin", counted.append, sha256=describe_file(source, "x").sha256)
    assert sorted(proxy.parts()) == [4, 5, 6]
    assert proxy.passed < SIZE - 3 * PART_BYTES + 10_000
    assert sum(counted) == SIZE
    assert same(folder, source, tmp_path)
    assert unfinished(server, folder) == []


def test_an_unfinished_upload_of_another_file_is_dropped(
    folder: Folder, proxy: Proxy, source: Path, tmp_path: Path, server: Credentials
) -> None:
    proxy.choose = lambda request: Fault(cut_after=0) if request.part == 4 else None
    with pytest.raises(StageError):
        folder.upload(source, "big.bin")
    assert len(unfinished(server, folder)) == 1
    proxy.choose = lambda _: None
    proxy.forget()
    source.write_bytes(os.urandom(SIZE))
    folder.upload(source, "big.bin")
    assert sorted(proxy.parts()) == [1, 2, 3, 4, 5, 6]
    assert same(folder, source, tmp_path)
    assert unfinished(server, folder) == []


def test_a_file_that_changed_in_its_later_parts_is_uploaded_as_it_is_now(
    folder: Folder, proxy: Proxy, source: Path, tmp_path: Path
) -> None:
    proxy.choose = lambda request: Fault(cut_after=0) if request.part == 6 else None
    with pytest.raises(StageError):
        folder.upload(source, "big.bin")
    proxy.choose = lambda _: None
    proxy.forget()
    with source.open("r+b") as stream:
        stream.seek(3 * PART_BYTES)
        stream.write(b"other bytes in part 4")
    folder.upload(source, "big.bin")
    assert sorted(proxy.parts()) == [4, 6]
    assert same(folder, source, tmp_path)


@pytest.mark.parametrize("size", [100_000, SIZE])
@pytest.mark.parametrize("damage", ["a flipped bit", "a truncated file", "a longer file"])
def test_a_file_that_is_not_what_was_written_is_not_published(
    folder: Folder, source: Path, damage: str, size: int, server: Credentials
) -> None:
    data = source.read_bytes()[:size]
    source.write_bytes(data)
    sha256 = describe_file(source, "x").sha256
    if damage == "a flipped bit":
        source.write_bytes(data[:-10] + bytes([data[-10] ^ 1]) + data[-9:])
    else:
        source.write_bytes(data[:-1] if damage == "a truncated file" else data + b"x")
    with pytest.raises(StageError, match=r"source\.bin is not what was written") as caught:
        folder.upload(source, "big.bin", sha256=sha256)
    assert caught.value.reason.retryable
    assert folder.stat("big.bin") is None
    assert unfinished(server, folder) == []


def test_a_progress_callback_can_end_an_upload_which_a_later_one_continues(
    folder: Folder, proxy: Proxy, source: Path, tmp_path: Path
) -> None:
    class CancelledError(Exception):
        pass

    def stop(_: int) -> None:
        raise CancelledError

    with pytest.raises(CancelledError):
        folder.upload(source, "big.bin", stop)
    assert folder.stat("big.bin") is None
    sent = set(proxy.parts())
    assert 0 < len(sent) < 6
    proxy.forget()
    folder.upload(source, "big.bin")
    assert sent.isdisjoint(proxy.parts())
    assert same(folder, source, tmp_path)


@BOTH
def test_a_copy_is_the_store_s_own_work(
    folder: Folder, proxy: Proxy, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.upload(source, "staged/big.bin")
    proxy.forget()
    folder.copy("staged/big.bin", "one.bin")
    monkeypatch.setattr("finetune_trainer.store.s3.COPYING.multipart_threshold", PART_BYTES)
    monkeypatch.setattr("finetune_trainer.store.s3.COPYING.multipart_chunksize", PART_BYTES)
    folder.copy("staged/big.bin", "two.bin")
    folder.delete(["staged/big.bin"])
    assert proxy.passed < 10_000
    assert same(folder, source, tmp_path, "one.bin")
    assert same(folder, source, tmp_path, "two.bin")
    assert [info.path for info in folder.list()] == ["one.bin", "two.bin"]
    with pytest.raises(FileNotFoundError, match=r"staged/big\.bin is missing"):
        folder.copy("staged/big.bin", "three.bin")


def test_what_was_never_finished_can_be_dropped(
    folder: Folder, proxy: Proxy, source: Path, server: Credentials
) -> None:
    proxy.choose = lambda request: Fault(cut_after=0) if request.part == 2 else None
    for path in ("stages/a/big.bin", "other/big.bin"):
        with pytest.raises(StageError):
            folder.upload(source, path)
    folder.abandon("stages/")
    assert unfinished(server, folder) == ["other/big.bin"]
    folder.abandon("other/")
    assert unfinished(server, folder) == []
