"""A bucket that 0.1.0 wrote retrains nothing: its tree is stored as its own code left it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract import (
    Artifact,
    PreparedRunConfig,
    Reason,
    RunConfig,
    Stage,
    StageError,
    StageResult,
    TrainingPlan,
)
from finetune_trainer.export import inputs
from finetune_trainer.model import base_model
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import Folder, open_folder
from finetune_trainer.store.marker import (
    MANIFEST,
    PUSHED,
    Pushed,
    open_stage,
    stage_folder,
)
from finetune_trainer.store.versions import (
    FIRST_MANIFEST,
    VersionMarker,
    current,
    find_pushed,
    version_name,
)
from finetune_trainer.train.supervisor.checkpoints import CheckpointStore, LocalCheckpoint
from hack.object_store import Credentials
from tests.integration.trainer import first_release
from tests.integration.trainer.conftest import Trainer, use_keys

TREE = first_release.ROOT / "output"
FORMER = json.loads((TREE / MANIFEST).read_text())["lineage"]["fingerprints"]
EVERY_STAGE = (Stage.PREPARE, Stage.TRAIN, Stage.EXPORT)

Prepare = Callable[..., StageResult]


@pytest.fixture
def config(moto: Credentials, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """run.json of then, with the bucket as it was left."""
    use_keys(moto, monkeypatch)
    first_release.upload(moto)
    yield first_release.first_config(moto.endpoint)
    first_release.remove(moto)


@pytest.fixture
def output(config: dict[str, Any]) -> Folder:
    run = RunConfig.model_validate(config)
    return open_folder(run.output.uri, run.storage)


@pytest.fixture
def prepare(config: dict[str, Any], tmp_path: Path) -> Prepare:
    count = iter(range(100))

    def run(**changes: Any) -> StageResult:
        changed = {**config, **changes}
        return first_release.prepare(changed, tmp_path / f"workspace-{next(count)}")

    return run


def prints(result: StageResult) -> dict[str, str]:
    assert result.resolved is not None
    found: dict[str, str] = result.resolved.fingerprints.model_dump()
    return found


def test_nothing_is_done_again(prepare: Prepare, moto: Credentials) -> None:
    before = first_release.keys(moto)
    first = prepare()
    assert first.complete == EVERY_STAGE
    assert {item.path for item in first.artifacts} == {
        item["path"] for item in json.loads((TREE / MANIFEST).read_text())["files"]
    }
    assert first.metrics == json.loads((TREE / MANIFEST).read_text())["metrics"]
    now = prints(first)
    assert not set(now.values()) & set(FORMER.values())
    after = first_release.keys(moto)
    assert after.keys() - before.keys() == {
        f"output/stages/{stage}/{now[stage]}/complete.json" for stage in ("prepare", "train")
    }, "nothing is copied"
    assert {key for key in before if after[key] != before[key]} == {f"output/{MANIFEST}"}
    for stage in ("prepare", "train"):  # today's markers are enough
        moto.client().delete_object(
            Bucket=first_release.BUCKET, Key=f"output/stages/{stage}/{FORMER[stage]}/complete.json"
        )
    assert prepare() == first


def test_the_manifest_keeps_everything_but_its_fingerprints(
    prepare: Prepare, output: Folder
) -> None:
    now = prints(prepare())
    former = json.loads((TREE / MANIFEST).read_text())
    manifest = json.loads(output.read(MANIFEST) or b"")
    assert (manifest["fingerprint"], manifest["lineage"]["fingerprints"]) == (now["export"], now)
    manifest["fingerprint"] = former["fingerprint"]
    manifest["lineage"]["fingerprints"] = former["lineage"]["fingerprints"]
    assert manifest == former


@pytest.mark.parametrize(
    ("change", "complete"),
    [
        ({"export": {"merged": True, "gguf": []}}, (Stage.PREPARE, Stage.TRAIN)),
        ({"training": {"learningRate": 0.001, "maxSequenceLength": 128}}, (Stage.PREPARE,)),
    ],
    ids=["another export", "another training"],
)
def test_what_changed_and_no_more_is_done_again(
    prepare: Prepare, change: dict[str, Any], complete: tuple[Stage, ...]
) -> None:
    assert prepare(**change).complete == complete


def test_an_export_that_was_pushed_is_not_pushed_again(
    prepare: Prepare, config: dict[str, Any], output: Folder
) -> None:
    manifest = hashlib.sha256(output.read(MANIFEST) or b"").hexdigest()
    note = Pushed(repo="org/tuned", revision="main", manifest_sha256=manifest, commit="https://hub")
    output.write(PUSHED, note.model_dump_json().encode())
    asked = {**config["output"], "hub": {"repo": "org/tuned"}}
    assert prepare(output=asked).complete == EVERY_STAGE
    hub = RunConfig.model_validate({**config, "output": asked}).output.hub
    assert hub is not None
    version = current(output)
    assert version is not None
    assert find_pushed(output, hub, version)


def test_the_stages_after_it_find_their_files(
    prepare: Prepare, config: dict[str, Any], output: Folder, tmp_path: Path
) -> None:
    resolved = prepare(export={"merged": True, "gguf": []}).resolved
    assert resolved is not None
    run = PreparedRunConfig.model_validate({**config, "resolved": resolved.model_dump()})
    fetched = inputs.fetch_inputs(run, output, tmp_path / "export")
    stored = TREE / "stages" / "train" / FORMER["train"] / "adapter"
    for file in stored.iterdir():
        assert (fetched.adapter / file.name).read_bytes() == file.read_bytes()
    assert fetched.examples.held_out is not None
    assert len(fetched.examples.measured()) == resolved.eval_rows == 2


def test_other_rows_under_the_same_name_are_trained_on(prepare: Prepare, moto: Credentials) -> None:
    rows = first_release.ROWS_FILE.read_bytes().replace(b"It is 2.", b"It is two.")
    moto.client().put_object(Bucket=first_release.BUCKET, Key="inputs/rows.csv", Body=rows)
    assert prepare().complete == ()


def leave_checkpoint(output: Folder, folder: Path) -> None:
    """An unfinished training of 0.1.0."""
    output.delete(
        info.path for info in output.list(f"{stage_folder(Stage.TRAIN, FORMER['train'])}/")
    )
    output.delete([MANIFEST])
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    plan = TrainingPlan(batch_size=4, gradient_accumulation_steps=1, gradient_checkpointing=False)
    CheckpointStore(output, FORMER["train"]).save(LocalCheckpoint(5, folder, plan, 128))


def test_an_unfinished_training_keeps_its_fingerprint_and_its_checkpoints(
    prepare: Prepare, output: Folder, tmp_path: Path
) -> None:
    """So the operator leaves a Job alone that still runs."""
    leave_checkpoint(output, tmp_path / "checkpoint")
    found = prepare()
    assert found.complete == (Stage.PREPARE,)
    assert prints(found)["train"] == FORMER["train"]
    other = prepare(training={"learningRate": 0.001, "maxSequenceLength": 128})
    assert prints(other)["train"] != FORMER["train"]


def test_a_training_that_ends_after_the_upgrade_is_found(
    prepare: Prepare, output: Folder, tmp_path: Path
) -> None:
    """It leaves its result under its fingerprint; `prepare` gives it today's one."""
    leave_checkpoint(output, tmp_path / "checkpoint")
    unfinished = prepare()
    CheckpointStore(output, FORMER["train"]).clear()
    former = stage_folder(Stage.TRAIN, FORMER["train"])
    for file in (TREE / former).rglob("*"):
        if file.is_file():
            output.upload(file, file.relative_to(TREE).as_posix())
    finished = prepare()
    assert finished.complete == (Stage.PREPARE, Stage.TRAIN)
    assert prints(finished)["train"] not in (FORMER["train"], prints(unfinished)["train"])
    assert prints(finished)["export"] == prints(unfinished)["export"]
    assert open_stage(output, Stage.TRAIN, prints(finished)["train"]).marker.base == former


def test_an_export_that_ends_after_the_upgrade_keeps_its_fingerprint(
    prepare: Prepare, output: Folder
) -> None:
    """Today's export of what 0.1.0 had planned: a version, and versions never change."""
    name = version_name(FORMER["export"])
    card = Artifact(path="README.md", bytes=1, sha256=hashlib.sha256(b"x").hexdigest())
    version = VersionMarker(
        stage=Stage.EXPORT, fingerprint=FORMER["export"], version=name, files=(card,)
    )
    output.write(f"versions/{name}/README.md", b"x")
    output.write(f"versions/{name}/{MANIFEST}", version.model_dump_json().encode())
    output.delete([MANIFEST])
    found = prepare()
    assert found.complete == EVERY_STAGE
    assert prints(found)["export"] == FORMER["export"]
    assert prints(found)["train"] != FORMER["train"]
    assert output.read(f"versions/{name}/{MANIFEST}") == version.model_dump_json().encode()
    assert prepare() == found


def test_examples_that_were_read_anew_and_came_out_otherwise_are_trained_on(
    prepare: Prepare, output: Folder
) -> None:
    """The former adapter doesn't know them."""
    now = prints(prepare())
    output.delete([MANIFEST, f"{stage_folder(Stage.TRAIN, now['train'])}/complete.json"])
    path = f"{stage_folder(Stage.PREPARE, now['prepare'])}/complete.json"
    marker = json.loads(output.read(path) or b"")
    for item in marker["files"]:
        if item["path"] == "examples.jsonl":
            item["sha256"] = "0" * 64
    output.write(path, json.dumps(marker).encode())
    assert prepare().complete == (Stage.PREPARE,)


def test_a_stage_that_0_1_0_planned_finds_its_model(config: dict[str, Any], tmp_path: Path) -> None:
    """The image was upgraded between `prepare` and `train`, whose model's revision is of then."""
    lineage = json.loads((TREE / MANIFEST).read_text())["lineage"]
    resolved = {
        "fingerprints": FORMER,
        "datasetETag": lineage["datasetETag"],
        "datasetRows": 22,
        "evalRows": 2,
        "modelRevision": lineage["modelRevision"],
    }
    run = PreparedRunConfig.model_validate({**config, "resolved": resolved})
    assert base_model.find(run.model, run.storage).revision != lineage["modelRevision"]
    folder = base_model.fetch_resolved(run, tmp_path / "model", Reporter())
    assert (folder.path / "model.safetensors").is_file()
    other = {**resolved, "modelRevision": "sha256:" + "0" * 64}
    run = PreparedRunConfig.model_validate({**config, "resolved": other})
    with pytest.raises(StageError) as caught:
        base_model.fetch_resolved(run, tmp_path / "other", Reporter())
    assert caught.value.reason is Reason.MODEL_NOT_FOUND


def test_only_the_export_runs_and_what_0_1_0_left_stays_until_it_is_pruned(
    trainer: Trainer, config: dict[str, Any], moto: Credentials, output: Folder, prepare: Prepare
) -> None:
    artifacts = {
        f"output/{item['path']}" for item in json.loads((TREE / MANIFEST).read_text())["files"]
    }
    before = first_release.keys(moto)
    changed = {**config, "export": {**config["export"], "verify": "warn"}}
    run = trainer("run", changed)
    assert run.code == 0, run.output
    assert "already there: prepare, train" in run.output
    assert "Training examples" not in run.output
    assert run.result is not None
    assert run.result.version
    after = first_release.keys(moto)
    assert {key: after[key] for key in artifacts} == {key: before[key] for key in artifacts}
    former = output.read(FIRST_MANIFEST)
    now = current(output)
    assert now is not None
    assert now.name == run.result.version

    back = prepare()  # as the spec was
    assert (back.complete, back.version) == (EVERY_STAGE, None)
    assert {f"output/{item.path}" for item in back.artifacts} == artifacts
    assert back.manifest_uri == output.uri_of(MANIFEST)
    assert json.loads(former or b"")["files"] == json.loads(output.read(MANIFEST) or b"")["files"]

    pruned = prepare(
        export=changed["export"], output={"uri": config["output"]["uri"], "keepVersions": 1}
    )
    assert (pruned.complete, pruned.version) == (EVERY_STAGE, run.result.version)
    left = first_release.keys(moto, "output/").keys()
    assert not artifacts & left
    assert f"output/{FIRST_MANIFEST}" not in left
    assert prepare(export=changed["export"]).complete == EVERY_STAGE
