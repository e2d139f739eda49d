"""Versions: which is complete, which is current; and what 0.1.0 left."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from finetune_trainer.contract import (
    Hub,
    Reason,
    Stage,
    StageError,
    digest,
)
from finetune_trainer.store import LocalFolder
from finetune_trainer.store.marker import (
    MANIFEST,
    PUSHED,
    Pushed,
    find_complete,
)
from finetune_trainer.store.versions import (
    FIRST_MANIFEST,
    adopt_first_manifest,
    current,
    find_pushed,
    find_version,
    list_versions,
    make_current,
    version_name,
    withdraw,
)
from tests.dying_folder import DyingFolder, KilledError, contents
from tests.unit.trainer.stored_versions import FILES, first_release, names, prints, written

EXPORT = Stage.EXPORT


@pytest.fixture
def output(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "output")


def test_a_version_is_current_when_manifest_json_names_it(output: LocalFolder) -> None:
    assert current(output) is None
    one, two = written(output, "one", "2026-01-01"), written(output, "two", "2026-01-02")
    assert current(output) is None
    for version in (one, two, one):
        make_current(output, version)
        now = current(output)
        assert now is not None
        assert (now.name, now.data) == (version.name, version.data)
        assert output.read(MANIFEST) == output.read(f"versions/{version.name}/{MANIFEST}")
    assert names(output) == [two.name, one.name]


@pytest.mark.parametrize("version", ["../../elsewhere", "..", "a/b", 7])
def test_a_manifest_that_names_no_version_of_this_folder_is_none(
    output: LocalFolder, version: object
) -> None:
    fields = {"stage": "export", "fingerprint": "x", "version": version, "files": []}
    output.write(MANIFEST, json.dumps(fields).encode())
    assert current(output) is None


def test_a_manifest_that_lies_in_another_version_s_folder_is_none(output: LocalFolder) -> None:
    one, two = written(output, "one", "2026-01-01"), written(output, "two", "2026-01-02")
    output.write(f"versions/{one.name}/{MANIFEST}", two.data)
    assert find_version(output, digest("one")) is None
    assert names(output) == [two.name]


def test_two_fingerprints_that_begin_alike_share_no_folder(output: LocalFolder) -> None:
    written(output, "one", "2026-01-01")
    alike = digest("one")[:12] + digest("two")[12:]
    assert find_version(output, alike) is None
    with pytest.raises(StageError, match=r"another fingerprint that begins alike") as caught:
        withdraw(output, alike)
    assert caught.value.reason is Reason.INVALID_CONFIG
    assert find_version(output, digest("one")) is not None


def test_a_manifest_of_a_later_release_is_read(output: LocalFolder) -> None:
    fields = json.loads(written(output, "one", "2026-01-01").data)
    fields["signedBy"], fields["files"][0]["tensors"] = "x", 12
    name = version_name(digest("one"))
    output.write(f"versions/{name}/{MANIFEST}", json.dumps(fields).encode())
    assert find_version(output, digest("one")) is not None


# --- What 0.1.0 left


def test_what_0_1_0_left_is_complete_and_current_until_another_version_stands(
    output: LocalFolder,
) -> None:
    manifest = first_release(output)
    marker = find_complete(output, EXPORT, "of 0.1.0")
    assert marker is not None
    assert {item.path for item in marker.files} == FILES.keys()
    now = current(output)
    assert now is not None
    assert (now.name, now.folder, now.manifest_path) == ("", "", MANIFEST)
    assert now.path("README.md") == "README.md"
    before = contents(output)
    assert make_current(output, now) is now
    assert contents(output) == before, "nothing is written"

    new = written(output, "new", "2025-12-31")  # a clock may be wrong: the other is the oldest
    make_current(output, new)
    assert output.read(FIRST_MANIFEST) == manifest
    assert names(output) == [new.name, ""]
    back = find_version(output, "of 0.1.0")
    assert back is not None
    make_current(output, back)
    assert output.read(MANIFEST) == manifest
    assert names(output) == [new.name, ""]
    output.delete(["README.md"])
    assert find_version(output, "of 0.1.0") is None


def test_an_interrupted_change_of_0_1_0_is_no_version(output: LocalFolder) -> None:
    """It was killed before it wrote its manifest, with the new files under their names or not."""
    manifest = first_release(output)
    output.delete([MANIFEST])
    output.write("stages/export/fp/commit.json", manifest)
    output.write("manifest.former.json", manifest)
    assert current(output) is None
    assert find_version(output, "of 0.1.0") is None
    assert names(output) == []


def test_a_foreign_manifest_is_no_version(output: LocalFolder) -> None:
    output.write(MANIFEST, b'{"name": "somebody else\'s"}')
    assert current(output) is None
    assert list_versions(output) == []


@pytest.mark.parametrize("now", ["current", "replaced"])
def test_the_manifest_of_0_1_0_gets_today_s_fingerprints_and_stays_pushed(
    output: LocalFolder, now: str
) -> None:
    hub = Hub(repo="org/tuned")
    data = first_release(output)
    sha256 = hashlib.sha256(data).hexdigest()
    pushed = Pushed(repo=hub.repo, revision="main", manifest_sha256=sha256, commit="url")
    output.write(PUSHED, pushed.model_dump_json().encode())
    if now == "replaced":
        make_current(output, written(output, "new", "2026-01-02"))
    assert not adopt_first_manifest(output, "another", prints("today"))
    assert find_version(output, "of 0.1.0") is not None

    for _ in range(2):  # it may be repeated
        adopted = adopt_first_manifest(output, "of 0.1.0", prints("today"))
        assert find_version(output, "of 0.1.0") is None
        version = find_version(output, digest("today"))
        assert version is not None
        assert version.name == ""
        assert find_pushed(output, hub, version)
        fields = json.loads(version.data)
        was = json.loads(data)
        was |= {"fingerprint": digest("today")}
        was["lineage"]["fingerprints"] = prints("today").model_dump()
        assert fields == was, "the rest stays as it was"
    assert not adopted
    version = find_version(output, digest("today"))
    assert version is not None
    where = FIRST_MANIFEST if now == "replaced" else MANIFEST
    assert output.read(where) == version.data
    assert {path: output.read(path) for path in FILES} == FILES


def test_a_death_at_any_moment_of_the_adoption_loses_neither_version_nor_push(
    output: LocalFolder,
) -> None:
    for moments in range(10):
        data = first_release(output)
        pushed = Pushed(
            repo="org/tuned",
            revision="main",
            manifest_sha256=hashlib.sha256(data).hexdigest(),
            commit="url",
        )
        output.write(PUSHED, pushed.model_dump_json().encode())
        try:
            adopt_first_manifest(DyingFolder(output, moments), "of 0.1.0", prints("today"))
        except KilledError:
            adopt_first_manifest(output, "of 0.1.0", prints("today"))
        else:
            break
        version = find_version(output, digest("today"))
        assert version is not None
        assert find_pushed(output, Hub(repo="org/tuned"), version)
        shutil.rmtree(output.root)
    assert moments == 2
