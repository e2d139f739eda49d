"""Pruning: which versions go, and which results of earlier stages with them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from finetune_trainer.contract import (
    Artifact,
    Fingerprints,
    Output,
    Stage,
    digest,
)
from finetune_trainer.store import LocalFolder
from finetune_trainer.store.marker import (
    MANIFEST,
    Marker,
    write_marker,
)
from finetune_trainer.store.versions import (
    FIRST_MANIFEST,
    current,
    find_version,
    make_current,
    make_current_and_prune,
    prune,
    version_name,
)
from tests.dying_folder import DyingFolder, KilledError, contents
from tests.unit.trainer.stored_versions import FILES, first_release, listed, names, prints, written


@pytest.fixture
def output(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "output")


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
    assert make_current_and_prune(output, settings, prints("unknown")) is None
    assert names(output) == [new.name, old.name]
    settled = make_current_and_prune(output, settings, prints("old"))
    assert settled is not None
    assert settled.name == old.name
    now = current(output)
    assert now is not None
    assert now.name == old.name
    assert names(output) == [new.name, old.name], "without keepVersions all are kept"
    make_current_and_prune(output, settings.model_copy(update={"keep_versions": 1}), prints("old"))
    assert names(output) == [old.name]
