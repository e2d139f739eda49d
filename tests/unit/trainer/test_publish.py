"""A new version is published as a whole, wherever it is interrupted."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_trainer.contract import Artifact, Quality, Reason, Stage, StageError
from finetune_trainer.export.publish import Publication
from finetune_trainer.export.publish.publication import SHA256SUMS, sha256sums
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import LocalFolder
from finetune_trainer.store.marker import MANIFEST, Marker, find_complete
from tests.dying_folder import DyingFolder, KilledError, contents
from tests.publishing import Version, manifest, publish

REPORTER = Reporter()
OLD: Version = {
    "adapter/weights": b"old adapter",
    "gguf/model-F16.gguf": b"old",
    "gguf/model-Q6_K.gguf": b"not in the new version",
    "README.md": b"card",
}
NEW: Version = {
    "adapter/weights": b"new adapter",
    "gguf/model-F16.gguf": b"new",
    "gguf/model-Q4_K_M.gguf": b"smaller",
    "rejected/model-Q3_K_M.gguf": b"bad",
    "README.md": b"card",
}
LATER: Version = {"adapter/weights": b"later adapter", "README.md": b"later"}


@pytest.fixture
def room(tmp_path: Path) -> Path:
    return tmp_path / "room"


@pytest.fixture
def output(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "output")


def test_the_new_version_replaces_the_former_one(output: LocalFolder, room: Path) -> None:
    output.write("data/train.csv", b"not ours")
    publish(output, room, "old", OLD)
    publish(output, room, "new", NEW)
    found = contents(output)
    assert found.pop("data/train.csv") == b"not ours"
    listed = json.loads(found.pop(MANIFEST))["files"]
    assert [item["path"] for item in listed] == [*NEW, SHA256SUMS]
    sums = found.pop(SHA256SUMS).decode().splitlines()
    assert found == NEW
    assert sums[0] == f"{hashlib.sha256(b'card').hexdigest()}  README.md"
    assert [line[66:] for line in sums] == sorted(NEW)


@pytest.mark.parametrize("then", ["the same again", "another version"])
def test_a_death_at_any_moment_leaves_no_wrong_manifest_and_is_cleaned_up(
    tmp_path: Path, then: str
) -> None:
    name, version = ("new", NEW) if then == "the same again" else ("later", LATER)
    clean = LocalFolder(tmp_path / "clean")
    publish(clean, tmp_path / "room", name, version)
    moments = 0
    for moments in range(1000):
        output = LocalFolder(tmp_path / "output")
        publish(output, tmp_path / "room", "old", OLD)
        dying = DyingFolder(output, moments)
        try:
            publish(dying, tmp_path / "room", "new", NEW)
        except KilledError:
            publish(DyingFolder(output), tmp_path / "room", name, version)
            assert contents(output) == contents(clean), f"after {moments} operations"
            shutil.rmtree(output.root)
        else:
            break
    assert moments > 25


def test_while_files_are_uploaded_the_former_version_is_whole(
    output: LocalFolder, room: Path
) -> None:
    publish(output, room, "old", OLD)
    with Publication(output, "new", REPORTER) as publication:
        for path, data in NEW.items():
            (room / path).parent.mkdir(parents=True, exist_ok=True)
            (room / path).write_bytes(data)
            publication.add(room / path, path)

        def build(files: tuple[Artifact, ...]) -> bytes:
            assert find_complete(output, Stage.EXPORT, "old")
            assert {path: output.read(path) for path in OLD} == OLD
            return manifest("new", files)

        publication.commit(build)
    assert output.read("gguf/model-F16.gguf") == b"new"


class Counting(LocalFolder):
    """Knows what was uploaded; can refuse one path, or hold uploads back."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.uploaded: list[str] = []
        self.refuse = ""
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()

    def upload(self, source: Path, path: str, *rest: object, **named: object) -> None:
        self.begun.set()
        self.gate.wait()
        if self.refuse and path.endswith(self.refuse):
            raise StageError(Reason.STORAGE_UNAVAILABLE, "gone")
        self.uploaded.append(path.rpartition("/")[2])
        super().upload(source, path, *rest, **named)  # type: ignore[arg-type]


@pytest.fixture
def counting(tmp_path: Path) -> Iterator[Counting]:
    folder = Counting(tmp_path / "output")
    yield folder
    folder.gate.set()


def files_of(room: Path, *names: str) -> list[Path]:
    room.mkdir(exist_ok=True)
    for name in names:
        (room / name).write_bytes(name.encode() * 100)
    return [room / name for name in names]


def test_an_interrupted_export_sends_no_finished_file_again(counting: Counting, room: Path) -> None:
    quality = Quality(kl_divergence=0.01, same_top_token=0.9, perplexity=3.0)
    one, two = files_of(room, "one", "two")
    counting.refuse = "two"
    with Publication(counting, "fp", REPORTER) as publication:
        publication.add(one, "one", quality)
        publication.add(two, "two")
        with pytest.raises(StageError, match="gone"):
            publication.commit(lambda files: manifest("fp", files))
    counting.refuse = ""
    with Publication(counting, "fp", REPORTER) as publication:
        assert publication.add(one, "one", quality).quality == quality
        publication.add(two, "two")
        publication.commit(lambda files: manifest("fp", files))
    assert counting.uploaded == ["one", "two"]
    assert contents(counting)["one"] == one.read_bytes()


def test_a_file_with_other_bytes_is_sent_again(counting: Counting, room: Path) -> None:
    for content in (b"first", b"other"):
        room.mkdir(exist_ok=True)
        (room / "one").write_bytes(content)
        with Publication(counting, "fp", REPORTER) as publication:
            publication.add(room / "one", "one")
            publication._finish_uploads()
    assert counting.uploaded == ["one", "one"]
    # So is one that was altered where it waits.
    counting.write("stages/export/fp/one", b"altered")
    with Publication(counting, "fp", REPORTER) as publication:
        publication.add(room / "one", "one")
        publication._finish_uploads()
    assert counting.uploaded == ["one", "one", "one"]


def test_computing_goes_on_while_files_are_uploaded(counting: Counting, room: Path) -> None:
    one, two = files_of(room, "one", "two")
    counting.gate.clear()
    with Publication(counting, "fp", REPORTER) as publication:
        publication.add(one, "one")
        publication.add(two, "two")
        assert counting.uploaded == []
        assert [item.path for item in publication.artifacts] == ["one", "two"]
        counting.gate.set()
        publication.commit(lambda files: manifest("fp", files))
    assert counting.uploaded == ["one", "two"]


def test_a_failed_upload_is_raised_by_the_next_call(counting: Counting, room: Path) -> None:
    one, two = files_of(room, "one", "two")
    counting.refuse = "one"
    with Publication(counting, "fp", REPORTER) as publication:
        publication.add(one, "one")
        publication._thread.join()
        with pytest.raises(StageError, match="gone"):
            publication.add(two, "two")
    assert counting.read(MANIFEST) is None


def test_closing_ends_an_upload_in_the_middle(counting: Counting, room: Path) -> None:
    one, two = files_of(room, "one", "two")
    counting.gate.clear()
    publication = Publication(counting, "fp", REPORTER)
    publication.add(one, "one")
    publication.add(two, "two")
    counting.begun.wait()
    publication._closing.set()
    counting.gate.set()
    publication.close()
    assert counting.uploaded == ["one"]
    assert contents(counting) == {}, "nothing half-written stays"


def test_a_file_that_changes_before_it_is_sent_is_not_published(
    counting: Counting, room: Path
) -> None:
    (one,) = files_of(room, "one")
    counting.gate.clear()
    with Publication(counting, "fp", REPORTER) as publication:
        publication.add(one, "one")
        one.write_bytes(one.read_bytes()[:-1])
        counting.gate.set()
        with pytest.raises(StageError, match="one is not what was written"):
            publication.commit(lambda files: manifest("fp", files))
    assert counting.read(MANIFEST) is None


def test_an_export_with_rejected_files_is_not_complete(output: LocalFolder, room: Path) -> None:
    publish(output, room, "old", OLD)
    assert find_complete(output, Stage.EXPORT, "old") is not None
    publish(output, room, "new", NEW)
    assert find_complete(output, Stage.EXPORT, "new") is None
    marker = Marker.model_validate_json(output.read(MANIFEST) or b"")
    assert [f.path for f in marker.files if f.rejected] == ["rejected/model-Q3_K_M.gguf"]


def test_a_former_manifest_can_not_name_files_of_others(
    output: LocalFolder, room: Path, tmp_path: Path
) -> None:
    (tmp_path / "outside").write_bytes(b"1")
    output.write("stages/train/x/complete.json", b"2")
    names = ("../outside", "stages/train/x/complete.json")
    listed = tuple(Artifact(path=name, bytes=1, sha256="") for name in names)
    output.write(MANIFEST, manifest("old", listed))
    publish(output, room, "new", NEW)
    assert (tmp_path / "outside").exists()
    assert output.read("stages/train/x/complete.json") == b"2"


def test_sha256sum_reads_what_is_written_and_finds_a_flipped_bit(
    output: LocalFolder, room: Path
) -> None:
    version = {**NEW, "gguf/a name with spaces and ü.gguf": b"x", "odd\\name": b"y"}
    publish(output, room, "new", version)

    def check() -> subprocess.CompletedProcess[str]:
        command = ["sha256sum", "--check", "--strict", SHA256SUMS]
        return subprocess.run(command, cwd=output.root, capture_output=True, text=True, check=False)

    assert check().returncode == 0, check().stderr
    file = output.root / "gguf" / "model-F16.gguf"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    assert check().returncode == 1
    assert "gguf/model-F16.gguf: FAILED" in check().stdout


def test_sums_are_sorted_by_path() -> None:
    items = [Artifact(path=path, bytes=1, sha256="0" * 64) for path in ("b", "a/c", "a")]
    lines = sha256sums(items).decode().splitlines()
    assert [line[66:] for line in lines] == ["a", "a/c", "b"]
