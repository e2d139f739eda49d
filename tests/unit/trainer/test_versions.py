"""Versions: which is complete, which is current, which go; and what 0.1.0 left."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract import (
    Artifact,
    Fingerprints,
    Hub,
    Output,
    Reason,
    Stage,
    StageError,
    digest,
)
from finetune_trainer.store import LocalFolder
from finetune_trainer.store.marker import (
    MANIFEST,
    PUSHED,
    Marker,
    Pushed,
    find_complete,
    write_marker,
)
from finetune_trainer.store.pruning import prune, settle
from finetune_trainer.store.versions import (
    FIRST_MANIFEST,
    Version,
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

EXPORT = Stage.EXPORT
FILES = {"gguf/model-F16.gguf": b"F16", "README.md": b"card"}


def prints(name: str) -> Fingerprints:
    """The export's is of the name, the training's of its first letter, and all have one dataset."""
    return Fingerprints(prepare=digest("data"), train=digest(name[0]), export=digest(name))


def listed(files: dict[str, bytes]) -> list[dict[str, Any]]:
    return [
        {"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for path, data in files.items()
    ]


def written(output: LocalFolder, name: str, at: str, files: dict[str, bytes] = FILES) -> Version:
    """A version with its manifest, and the results of the stages before it; not the current one."""
    of = prints(name)
    fields = {
        "stage": "export",
        "fingerprint": of.export,
        "version": version_name(of.export),
        "created": at,
        "files": listed(files),
        "lineage": {"fingerprints": of.model_dump(), "model": "a/b"},
    }
    folder = f"versions/{version_name(of.export)}"
    for path, data in files.items():
        output.write(f"{folder}/{path}", data)
    output.write(f"{folder}/{MANIFEST}", json.dumps(fields).encode())
    for stage in (Stage.PREPARE, Stage.TRAIN):
        output.write(f"stages/{stage}/{getattr(of, stage)}/complete.json", b"{}")
    output.write(f"stages/train/{of.train}/checkpoints/10/weights", b"w")
    version = find_version(output, of.export)
    assert version is not None
    return version


def first_release(output: LocalFolder, files: dict[str, bytes] = FILES) -> bytes:
    """What 0.1.0 leaves; returns its manifest."""
    for path, data in files.items():
        output.write(path, data)
    fields = {
        "stage": "export",
        "fingerprint": "of 0.1.0",
        "files": listed(files),
        "created": "2026-01-01T00:00:00Z",
        "lineage": {
            "dataset": "s3://d/a.csv",
            "fingerprints": {"prepare": "p0", "train": "t0", "export": "of 0.1.0"},
        },
        "metrics": {"evalLoss": 1.5},
    }
    data = json.dumps(fields, indent=2).encode()
    output.write(MANIFEST, data)
    for stage in ("prepare/p0", "train/t0"):
        output.write(f"stages/{stage}/complete.json", b"{}")
    return data


@pytest.fixture
def output(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "output")


def names(output: LocalFolder) -> list[str]:
    return [version.name for version in list_versions(output)]


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


# --- Pruning


def stages(output: LocalFolder) -> set[str]:
    found = [path.split("/") for path in contents(output) if path.startswith("stages/")]
    return {f"{stage} {fingerprint[:6]}" for _, stage, fingerprint, *_ in found}


def test_older_versions_go_with_the_stages_that_no_kept_version_is_made_of(
    output: LocalFolder,
) -> None:
    first_release(output)
    a1 = written(output, "a1", "2026-01-02")
    b1 = written(output, "b1", "2026-01-03")
    b2 = written(output, "b2", "2026-01-04")
    output.write("stages/export/someone/uploads.json", b"[]")
    output.write("README.txt", b"not ours")
    output.write("owner.json", b"{}")
    make_current(output, b2)
    kept = {version.name: contents(output) for version in (b1, b2)}
    prune(output, 3, prints("b2"))
    assert names(output) == [b2.name, b1.name, a1.name]
    assert output.read(FIRST_MANIFEST) is None
    assert [output.read(path) for path in FILES] == [None, None]
    prune(output, 2, prints("b2"))
    assert names(output) == [b2.name, b1.name]
    assert stages(output) == {f"prepare {digest('data')[:6]}", f"train {digest('b')[:6]}"}
    left = contents(output)
    assert left["README.txt"] == b"not ours"
    assert left["owner.json"] == b"{}"
    for name, before in kept.items():
        there = {path: data for path, data in before.items() if path.startswith(f"versions/{name}")}
        assert there.items() <= left.items()
    prune(output, 2, prints("b2"))
    assert contents(output) == left


def test_the_current_version_is_kept_and_good_ones_before_bad_ones(output: LocalFolder) -> None:
    bad = {"gguf/a.gguf": b"a", "rejected/b.gguf": b"b"}
    old = written(output, "old", "2026-01-01")
    middle = written(output, "middle", "2026-01-02")
    written(output, "newer", "2026-01-03")
    written(output, "bad", "2026-01-04", bad)
    make_current(output, old)
    prune(output, 3, prints("old"))
    assert set(names(output)) == {old.name, middle.name, version_name(digest("newer"))}
    prune(output, 1, prints("old"))
    assert names(output) == [old.name], "going back to it counts, not its age"


def test_the_present_run_s_stages_stay(output: LocalFolder) -> None:
    version = written(output, "a", "2026-01-01")
    make_current(output, version)
    output.write(f"stages/train/{digest('p')}/checkpoints/5/weights", b"w")
    prune(output, 1, prints("present"))
    assert f"train {digest('p')[:6]}" in stages(output)
    prune(output, 1, prints("a"))
    assert f"train {digest('p')[:6]}" not in stages(output)


def test_a_stage_s_files_stay_where_its_marker_names_another_folder(output: LocalFolder) -> None:
    """As it does for what 0.1.0 left, which is known by another fingerprint now."""
    make_current(output, written(output, "a", "2026-01-01"))
    output.write("stages/train/of-0-1-0/adapter/weights", b"w")
    sha256 = hashlib.sha256(b"w").hexdigest()
    marker = Marker(
        stage=Stage.TRAIN,
        fingerprint=digest("a"),
        files=(Artifact(path="adapter/weights", bytes=1, sha256=sha256),),
        folder="stages/train/of-0-1-0",
    )
    write_marker(output, marker)
    output.write("stages/train/other/complete.json", b"{}")
    prune(output, 1, prints("a"))
    assert output.read("stages/train/of-0-1-0/adapter/weights") == b"w"
    assert output.read("stages/train/other/complete.json") is None


def test_where_a_kept_version_does_not_say_what_it_is_made_of_all_stages_stay(
    output: LocalFolder,
) -> None:
    version = written(output, "a", "2026-01-01")
    fields = json.loads(version.data)
    del fields["lineage"]
    output.write(f"versions/{version.name}/{MANIFEST}", json.dumps(fields).encode())
    unclear = find_version(output, digest("a"))
    assert unclear is not None
    make_current(output, unclear)
    output.write(f"stages/train/{digest('z')}/complete.json", b"{}")
    prune(output, 1, prints("a"))
    assert f"train {digest('z')[:6]}" in stages(output)


def test_nothing_goes_where_nothing_is_current(output: LocalFolder) -> None:
    written(output, "a", "2026-01-01")
    written(output, "b", "2026-01-02")
    before = contents(output)
    prune(output, 1, prints("a"))
    assert contents(output) == before


def test_what_0_1_0_listed_outside_its_own_files_stays(output: LocalFolder, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"1")
    names = ("../outside", "stages/train/x/complete.json", "owner.json", "versions/a/b")
    for path in names[1:]:
        output.write(path, b"1")
    first_release(output, {})
    fields = json.loads(output.read(MANIFEST) or b"")
    fields["files"] = listed(dict.fromkeys(names, b"1"))
    output.write(MANIFEST, json.dumps(fields).encode())
    version = written(output, "x", "2026-01-02")
    make_current(output, version)
    output.write("stages/train/x/complete.json", b"1")
    prune(output, 1, Fingerprints(prepare=digest("data"), train="x", export=digest("x")))
    assert (tmp_path / "outside").exists()
    assert [output.read(path) for path in names[1:]] == [b"1"] * 3


def test_a_death_at_any_moment_of_pruning_leaves_no_half_version(output: LocalFolder) -> None:
    for moments in range(1000):
        first_release(output)
        for number, name in enumerate(("a1", "b1", "c1")):
            version = written(output, name, f"2026-01-0{number + 2}")
            make_current(output, version)
        dying = DyingFolder(output, moments)
        try:
            prune(dying, 1, prints("c1"))
        except KilledError:
            prune(DyingFolder(output), 1, prints("c1"))
        else:
            break
        assert names(output) == [version_name(digest("c1"))]
        assert stages(output) == {f"prepare {digest('data')[:6]}", f"train {digest('c')[:6]}"}
        assert len(contents(output)) == 1 + 1 + len(FILES) + 3
        shutil.rmtree(output.root)
    assert moments > 15


def test_settling_makes_the_run_s_version_current_and_then_prunes(output: LocalFolder) -> None:
    """As `prepare` does it where an edit went back to what the store still holds."""
    old, new = written(output, "old", "2026-01-01"), written(output, "new", "2026-01-02")
    make_current(output, new)
    settings = Output(uri=str(output.root))
    assert settle(output, settings, prints("unknown")) is None
    assert names(output) == [new.name, old.name]
    settled = settle(output, settings, prints("old"))
    assert settled is not None
    assert settled.name == old.name
    now = current(output)
    assert now is not None
    assert now.name == old.name
    assert names(output) == [new.name, old.name], "without keepVersions all are kept"
    settle(output, settings.model_copy(update={"keep_versions": 1}), prints("old"))
    assert names(output) == [old.name]
