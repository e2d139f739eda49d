"""Uploads that are cut off, damaged and killed: in the end the store has every byte, or says so."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_trainer.contract import Reason, StageError, Storage
from finetune_trainer.store import Folder, open_folder
from finetune_trainer.store.marker import describe_file
from hack.object_store import Credentials
from tests.integration.trainer.conftest import ALL_STORES, keys_of, use_keys
from tests.integration.trainer.killing import wait_for
from tests.integration.trainer.s3_proxy import Fault, Proxy, Request, s3_proxy, wants_md5

PART_BYTES = 5 << 20  # the smallest that S3 takes, and moto
SIZE = 5 * PART_BYTES + 12345  # six parts
CHILD = """
import resource, sys
from pathlib import Path
from finetune_trainer.contract import Storage
from finetune_trainer.store import open_folder, s3_folder
s3_folder.PART_BYTES = int(sys.argv[4])
uri, endpoint, source = sys.argv[1:4]
folder = open_folder(uri, Storage(endpoint=endpoint))
folder.write("small", b"1")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
folder.upload(Path(source), "big.bin")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
ATTEMPTS = 6  # of each request
ALL = pytest.mark.parametrize("server", ALL_STORES, indirect=True)
# moto doesn't check what arrives.
REAL = pytest.mark.parametrize("server", [s for s in ALL_STORES if s != "moto"], indirect=True)


@pytest.fixture
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Credentials:
    found = keys_of(request, getattr(request, "param", "seaweed"))
    client = found.client()
    if "uploads" not in {each["Name"] for each in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket="uploads")
    use_keys(found, monkeypatch)
    monkeypatch.setattr("finetune_trainer.store.s3_folder.PART_BYTES", PART_BYTES)
    # Nothing here gets better with time.
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


@ALL
def test_connections_that_are_cut_at_random_bytes_cost_only_what_was_on_its_way(
    folder: Folder, proxy: Proxy, source: Path, tmp_path: Path
) -> None:
    dice = random.Random(7)  # noqa: S311 - no secret
    cuts: Counter[int | None] = Counter()

    def choose(request: Request) -> Fault | None:
        if request.size < 1000 or cuts[request.part] == 2:
            return None
        cuts[request.part] += 1
        return Fault(cut_after=dice.randrange(request.size))

    proxy.choose = choose
    counted: list[int] = []
    folder.upload(source, "big.bin", counted.append, sha256=describe_file(source, "x").sha256)
    assert proxy.faults == 12, "two of each part"
    assert sum(counted) == SIZE
    assert same(folder, source, tmp_path)


@ALL
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


@REAL
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


def test_a_line_that_always_damages_is_named(
    folder: Folder, proxy: Proxy, source: Path, server: Credentials
) -> None:
    proxy.choose = lambda request: Fault(flip_at=5) if request.part == 2 else None
    with pytest.raises(StageError, match=r"does not arrive .* as it was sent") as caught:
        folder.upload(source, "big.bin")
    assert caught.value.reason is Reason.STORAGE_UNAVAILABLE
    assert proxy.parts().count(2) == ATTEMPTS, "retries are in one place"
    assert folder.stat("big.bin") is None
    assert unfinished(server, folder) == []


def test_what_a_killed_process_began_is_dropped_by_the_next_upload(
    folder: Folder, proxy: Proxy, source: Path, tmp_path: Path, server: Credentials
) -> None:
    held = {4, 5, 6}  # never answered before the process is killed
    proxy.choose = lambda request: Fault(cut_after=1000) if request.part in held else None
    command = [sys.executable, "-c", CHILD, folder.uri, proxy.endpoint, str(source)]
    with subprocess.Popen([*command, str(PART_BYTES)]) as child:
        wait_for(lambda: {1, 2, 3, 4} <= set(proxy.parts()), "three parts")
        wait_for(lambda: proxy.passed > 3 * PART_BYTES, "their bytes")
        assert child.poll() is None
        child.kill()
    assert folder.stat("big.bin") is None
    assert unfinished(server, folder) == ["big.bin"]
    proxy.choose = lambda _: None
    counted: list[int] = []
    folder.upload(source, "big.bin", counted.append, sha256=describe_file(source, "x").sha256)
    assert sum(counted) == SIZE
    assert same(folder, source, tmp_path)
    assert unfinished(server, folder) == []


def test_a_large_file_takes_little_memory(
    folder: Folder, tmp_path: Path, server: Credentials
) -> None:
    source = tmp_path / "large"
    with source.open("wb") as stream:
        stream.truncate(192 << 20)
    command = [sys.executable, "-c", CHILD, folder.uri, server.endpoint, str(source)]
    child = subprocess.run([*command, str(8 << 20)], check=True, stdout=subprocess.PIPE, text=True)
    assert int(child.stdout) < 96 << 10, "in KiB: some parts of 8 MiB"
    info = folder.stat("big.bin")
    assert info is not None
    assert info.size == 192 << 20
    folder.delete(["big.bin"])


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


def test_a_progress_callback_can_end_an_upload(
    folder: Folder, proxy: Proxy, source: Path, server: Credentials
) -> None:
    class StoppedError(Exception):
        pass

    def stop(_: int) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        folder.upload(source, "big.bin", stop)
    assert len(proxy.parts()) <= 4, "no request is repeated"
    assert folder.stat("big.bin") is None
    assert unfinished(server, folder) == []


@ALL
def test_what_was_never_finished_can_be_dropped(folder: Folder, server: Credentials) -> None:
    prefix = folder.uri.removeprefix("s3://uploads/")
    for path in ("stages/a/big.bin", "other/big.bin"):
        server.client().create_multipart_upload(Bucket="uploads", Key=f"{prefix}/{path}")
    folder.abandon("stages/")
    assert unfinished(server, folder) == ["other/big.bin"]
    folder.abandon("other/")
    assert unfinished(server, folder) == []


@ALL
def test_every_body_that_is_sent_has_its_md5(
    folder: Folder, proxy: Proxy, source: Path, tmp_path: Path
) -> None:
    """On the wire, before a store that refuses what has none."""
    proxy.choose = wants_md5
    folder.write("small", b"1")
    assert folder.create("owner", b"2")
    folder.upload(source, "big.bin", sha256=describe_file(source, "x").sha256)
    folder.delete(["small", "owner"])
    assert proxy.faults == 0
    assert same(folder, source, tmp_path)
    by_operation = {
        name: {each.checked for each in proxy.requests if each.operation == name}
        for name in ("PutObject", "UploadPart", "DeleteObjects")
    }
    assert by_operation == {name: {True} for name in by_operation}
    others = [name for each in proxy.requests for name in each.headers if "crc32" in name]
    assert others == [], "a checksum that not every store knows"


def test_a_store_that_does_not_know_if_none_match_is_read_and_written(
    folder: Folder, proxy: Proxy
) -> None:
    proxy.choose = lambda request: (
        Fault(refuse=(501, "NotImplemented")) if "if-none-match" in request.headers else None
    )
    assert folder.create("owner", b"first")
    assert not folder.create("owner", b"second")
    assert folder.read("owner") == b"first"
    assert proxy.faults == 1


def test_two_who_create_at_the_same_moment_try_again(folder: Folder, proxy: Proxy) -> None:
    proxy.choose = lambda request: (
        Fault(refuse=(409, "ConditionalRequestConflict"))
        if "if-none-match" in request.headers and proxy.faults < 2
        else None
    )
    assert folder.create("owner", b"first")
    assert proxy.faults == 2


@ALL
def test_a_lost_answer_to_a_creation_makes_nobody_else_its_author(
    folder: Folder, proxy: Proxy
) -> None:
    proxy.choose = lambda request: (
        Fault(lose_answer=True) if "if-none-match" in request.headers and not proxy.faults else None
    )
    assert folder.create("owner", b"first")
    assert not folder.create("owner", b"second")
    assert proxy.faults == 1
