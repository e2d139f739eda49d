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
from finetune_trainer.export.publish import SHA256SUMS, Publication, finish, sha256sums
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import PARTIAL, LocalFolder
from finetune_trainer.store.marker import MANIFEST, find_complete
from finetune_trainer.store.versions import current
from tests.dying_folder import DyingFolder, KilledError, contents
from tests.publishing import Version, fingerprint, folder, manifest, publish

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
    "README.md": b"card",
}
BAD: Version = {"gguf/model-F16.gguf": b"new", "rejected/model-Q3_K_M.gguf": b"bad"}
LATER: Version = {"adapter/weights": b"later adapter", "README.md": b"later"}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return tmp_path / "workspace"


@pytest.fixture
def output(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "output")


def held(output: LocalFolder, name: str) -> dict[str, bytes]:
    """The files of a version, by their paths in it."""
    base = f"{folder(name)}/"
    return {
        path.removeprefix(base): data
        for path, data in contents(output).items()
        if path.startswith(base)
    }


def test_a_new_version_has_its_own_folder_and_becomes_current(
    output: LocalFolder, workspace: Path
) -> None:
    output.write("data/train.csv", b"not ours")
    publish(output, workspace, "old", OLD)
    old = held(output, "old")
    publish(output, workspace, "new", NEW)
    assert held(output, "old") == old, "a version never changes"
    new = held(output, "new")
    assert output.read(MANIFEST) == new[MANIFEST]
    listed = json.loads(new.pop(MANIFEST))["files"]
    assert [item["path"] for item in listed] == [*NEW, SHA256SUMS]
    sums = new.pop(SHA256SUMS).decode().splitlines()
    assert new == NEW
    assert sums[0] == f"{hashlib.sha256(b'card').hexdigest()}  README.md"
    assert [line[66:] for line in sums] == sorted(NEW)
    others = {path for path in contents(output) if not path.startswith("versions/")}
    assert others == {"data/train.csv", MANIFEST}, "nothing else is left"


@pytest.mark.parametrize("then", ["the same again", "another version"])
def test_a_death_at_any_moment_leaves_the_former_version_whole_and_current(
    tmp_path: Path, then: str
) -> None:
    name, version = ("new", NEW) if then == "the same again" else ("later", LATER)
    clean = LocalFolder(tmp_path / "clean")
    publish(clean, tmp_path / "workspace", "old", OLD)
    publish(clean, tmp_path / "workspace", name, version)
    both = LocalFolder(tmp_path / "both")
    publish(both, tmp_path / "workspace", "old", OLD)
    publish(both, tmp_path / "workspace", "new", NEW)
    publish(both, tmp_path / "workspace", name, version)
    moments = 0
    for moments in range(1000):
        output = LocalFolder(tmp_path / "output")
        publish(output, tmp_path / "workspace", "old", OLD)
        old = held(output, "old")
        dying = DyingFolder(output, moments)
        try:
            publish(dying, tmp_path / "workspace", "new", NEW)
        except KilledError:
            assert held(output, "old") == old
            stands = find_complete(output, Stage.EXPORT, fingerprint("new"))
            now = current(output)
            assert now is not None
            assert now.data == old[MANIFEST] or stands, "only a whole version is current"
            publish(DyingFolder(output), tmp_path / "workspace", name, version)
            expected = contents(both if stands else clean)
            assert contents(output) == expected, f"after {moments} operations"
            shutil.rmtree(output.root)
        else:
            break
    assert moments > 10


def test_while_files_are_uploaded_the_former_version_is_whole_and_current(
    output: LocalFolder, workspace: Path
) -> None:
    publish(output, workspace, "old", OLD)
    old = held(output, "old")
    with Publication(output, fingerprint("new"), REPORTER) as publication:
        for path, data in NEW.items():
            (workspace / path).parent.mkdir(parents=True, exist_ok=True)
            (workspace / path).write_bytes(data)
            publication.add(workspace / path, path)

        def build(files: tuple[Artifact, ...]) -> bytes:
            assert find_complete(output, Stage.EXPORT, fingerprint("old"))
            assert held(output, "old") == old
            assert output.read(MANIFEST) == old[MANIFEST]
            return manifest("new", files)

        publication.commit(build)
    assert output.read(MANIFEST) == held(output, "new")[MANIFEST]


def test_going_back_to_a_former_version_is_one_write(output: LocalFolder, workspace: Path) -> None:
    publish(output, workspace, "old", OLD)
    publish(output, workspace, "new", NEW)
    before = contents(output)
    dying = DyingFolder(output, 1)
    with pytest.raises(KilledError):  # on looking for what others left
        publish(dying, workspace, "old", {})
    assert contents(output) == {**before, MANIFEST: before[f"{folder('old')}/{MANIFEST}"]}


def test_what_another_attempt_put_into_the_folder_goes_before_the_manifest_comes(
    output: LocalFolder, workspace: Path
) -> None:
    """Such as a file that was refused there and not here."""
    output.write(f"{folder('new')}/rejected/model-F16.gguf", b"from an earlier attempt")
    publish(output, workspace, "new", NEW)
    assert held(output, "new").keys() == {*NEW, SHA256SUMS, MANIFEST}


def test_exports_that_were_given_up_are_cleaned_up_and_other_folders_stay(
    output: LocalFolder, workspace: Path
) -> None:
    output.write(f"{folder('given up')}/gguf/model-F16.gguf", b"half")
    output.write(f"stages/export/{fingerprint('given up')}/uploads.json", b"[]")
    output.write("versions/notes/of-mine.txt", b"not ours")
    publish(output, workspace, "new", NEW)
    expected = {f"{folder('new')}/{path}" for path in (*NEW, SHA256SUMS, MANIFEST)}
    assert contents(output).keys() == {*expected, MANIFEST, "versions/notes/of-mine.txt"}


def test_a_version_that_lost_a_file_is_made_again(output: LocalFolder, workspace: Path) -> None:
    publish(output, workspace, "old", OLD)
    publish(output, workspace, "new", NEW)
    output.delete([f"{folder('new')}/README.md"])
    assert find_complete(output, Stage.EXPORT, fingerprint("new")) is None
    with Publication(output, fingerprint("new"), REPORTER):
        # Nothing is true of it any more.
        assert MANIFEST not in held(output, "new")
        assert output.read(MANIFEST) is None
    publish(output, workspace, "new", NEW)
    assert held(output, "new").keys() == {*NEW, SHA256SUMS, MANIFEST}
    assert find_complete(output, Stage.EXPORT, fingerprint("new")) is not None


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


def files_of(workspace: Path, *names: str) -> list[Path]:
    workspace.mkdir(exist_ok=True)
    for name in names:
        (workspace / name).write_bytes(name.encode() * 100)
    return [workspace / name for name in names]


def test_an_interrupted_export_sends_no_finished_file_again(
    counting: Counting, workspace: Path
) -> None:
    quality = Quality(kl_divergence=0.01, same_top_token=0.9, perplexity=3.0)
    one, two = files_of(workspace, "one", "two")
    counting.refuse = "two"
    with Publication(counting, fingerprint("fp"), REPORTER) as publication:
        publication.add(one, "one", quality)
        publication.add(two, "two")
        with pytest.raises(StageError, match="gone"):
            publication.commit(lambda files: manifest("fp", files))
    counting.refuse = ""
    with Publication(counting, fingerprint("fp"), REPORTER) as publication:
        assert publication.add(one, "one", quality).quality == quality
        publication.add(two, "two")
        publication.commit(lambda files: manifest("fp", files))
    assert counting.uploaded == ["one", "two"]
    assert counting.read(f"{folder('fp')}/one") == one.read_bytes()


def test_what_a_killed_export_had_written_in_part_goes_at_once(
    output: LocalFolder, workspace: Path
) -> None:
    """Its version's alone; others' go when a version is published."""
    (one,) = files_of(workspace, "one")
    with Publication(output, fingerprint("fp"), REPORTER) as publication:
        publication.add(one, "gguf/one")
    left, others = (
        output.root / folder(name) / "gguf" / f"{PARTIAL}0-two" for name in ("fp", "other")
    )
    for file in (left, others):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"half")
    with Publication(output, fingerprint("fp"), REPORTER) as publication:
        assert (left.exists(), others.exists()) == (False, True)
        publication.add(one, "gguf/one")
        publication.commit(lambda files: manifest("fp", files))
    assert output.read(f"{folder('fp')}/gguf/one") == one.read_bytes()


def test_a_file_with_other_bytes_is_sent_again(counting: Counting, workspace: Path) -> None:
    for content in (b"first", b"other"):
        workspace.mkdir(exist_ok=True)
        (workspace / "one").write_bytes(content)
        with Publication(counting, fingerprint("fp"), REPORTER) as publication:
            publication.add(workspace / "one", "one")
            publication._finish_uploads()
    assert counting.uploaded == ["one", "one"]
    # So is one that was altered in the store.
    counting.write(f"{folder('fp')}/one", b"altered")
    with Publication(counting, fingerprint("fp"), REPORTER) as publication:
        publication.add(workspace / "one", "one")
        publication._finish_uploads()
    assert counting.uploaded == ["one", "one", "one"]


def test_computing_goes_on_while_files_are_uploaded(counting: Counting, workspace: Path) -> None:
    one, two = files_of(workspace, "one", "two")
    counting.gate.clear()
    with Publication(counting, fingerprint("fp"), REPORTER) as publication:
        publication.add(one, "one")
        publication.add(two, "two")
        assert counting.uploaded == []
        assert [item.path for item in publication.artifacts] == ["one", "two"]
        counting.gate.set()
        publication.commit(lambda files: manifest("fp", files))
    assert counting.uploaded == ["one", "two"]


def test_a_file_that_nobody_needs_leaves_the_disk_when_it_has_been_sent(
    counting: Counting, workspace: Path
) -> None:
    one, two, three = files_of(workspace, "one", "two", "three")
    counting.gate.clear()
    with Publication(counting, fingerprint("fp"), REPORTER) as publication:
        publication.add(one, "one")
        publication.add(two, "two")
        publication.discard(one)
        publication.discard(three)  # which isn't to be sent at all
        assert [file.exists() for file in (one, two, three)] == [True, True, False]
        counting.gate.set()
        publication._finish_uploads()
        assert [file.exists() for file in (one, two)] == [False, True]
        publication.discard(two)
        assert not two.exists()
        publication.commit(lambda files: manifest("fp", files))
    assert (counting.read(f"{folder('fp')}/one") or b"").startswith(b"one")


def test_a_failed_upload_is_raised_by_the_next_call(counting: Counting, workspace: Path) -> None:
    one, two = files_of(workspace, "one", "two")
    counting.refuse = "one"
    with Publication(counting, fingerprint("fp"), REPORTER) as publication:
        publication.add(one, "one")
        publication._thread.join()
        with pytest.raises(StageError, match="gone"):
            publication.add(two, "two")
    assert counting.read(MANIFEST) is None


def test_closing_ends_an_upload_in_the_middle(counting: Counting, workspace: Path) -> None:
    one, two = files_of(workspace, "one", "two")
    counting.gate.clear()
    publication = Publication(counting, fingerprint("fp"), REPORTER)
    publication.add(one, "one")
    publication.add(two, "two")
    counting.begun.wait()
    publication._closing.set()
    counting.gate.set()
    publication.close()
    assert counting.uploaded == ["one"]
    assert contents(counting) == {}, "nothing half-written stays"


def test_a_file_that_changes_before_it_is_sent_is_not_published(
    counting: Counting, workspace: Path
) -> None:
    (one,) = files_of(workspace, "one")
    counting.gate.clear()
    with Publication(counting, fingerprint("fp"), REPORTER) as publication:
        publication.add(one, "one")
        one.write_bytes(one.read_bytes()[:-1])
        counting.gate.set()
        with pytest.raises(StageError, match="one is not what was written"):
            publication.commit(lambda files: manifest("fp", files))
    assert counting.read(MANIFEST) is None


def test_a_version_with_rejected_files_does_not_replace_a_good_one(
    output: LocalFolder, workspace: Path
) -> None:
    publish(output, workspace, "bad", BAD)
    assert find_complete(output, Stage.EXPORT, fingerprint("bad")) is None
    assert output.read(MANIFEST) == held(output, "bad")[MANIFEST], "the first is better than none"
    publish(output, workspace, "old", OLD)
    old = held(output, "old")[MANIFEST]
    assert output.read(MANIFEST) == old
    publish(output, workspace, "worse", BAD)
    published = finish(output, fingerprint("worse"))
    assert published is not None
    assert (published.version.rejected, published.current.data) == (True, old)
    assert output.read(MANIFEST) == old
    output.delete([f"{folder('old')}/README.md"])
    publish(output, workspace, "worse", BAD)
    assert output.read(MANIFEST) != old, "and better than one that is not whole"


def test_sha256sum_reads_what_is_written_and_finds_a_flipped_bit(
    output: LocalFolder, workspace: Path
) -> None:
    files = {**NEW, "gguf/a name with spaces and ü.gguf": b"x", "odd\\name": b"y"}
    publish(output, workspace, "new", files)
    version = output.root / folder("new")

    def check() -> subprocess.CompletedProcess[str]:
        command = ["sha256sum", "--check", "--strict", SHA256SUMS]
        return subprocess.run(command, cwd=version, capture_output=True, text=True, check=False)

    assert check().returncode == 0, check().stderr
    file = version / "gguf" / "model-F16.gguf"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    assert check().returncode == 1
    assert "gguf/model-F16.gguf: FAILED" in check().stdout


def test_sums_are_sorted_by_path() -> None:
    items = [Artifact(path=path, bytes=1, sha256="0" * 64) for path in ("b", "a/c", "a")]
    lines = sha256sums(items).decode().splitlines()
    assert [line[66:] for line in lines] == ["a", "a/c", "b"]
