"""`prepare` with `rollbackTo`, on disk and in buckets: one write, and nothing is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from finetune_trainer.contract import (
    Fingerprints,
    GateReport,
    Lineage,
    Manifest,
    Output,
    Reason,
    RunConfig,
    Stage,
    StageError,
    StageResult,
    Storage,
    digest,
)
from finetune_trainer.export.export_stage import encoded
from finetune_trainer.export.publish import Publication
from finetune_trainer.prepare import prepare_stage
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import Folder, open_folder
from finetune_trainer.store.marker import MANIFEST
from finetune_trainer.store.versions import (
    current,
    list_versions,
    make_current_and_prune,
    prune,
    version_name,
)
from tests.dying_folder import contents
from tests.integration.trainer.conftest import ALL_STORES, keys_of, use_keys

JOB = {"namespace": "team", "name": "support"}
TIMES = {
    "one": "2026-11-01T00:00:00Z",
    "two": "2026-11-02T00:00:00Z",
    "three": "2026-11-03T00:00:00Z",
}


def prints(name: str) -> Fingerprints:
    return Fingerprints(
        prepare=digest(f"prepare {name}"), train=digest(f"train {name}"), export=digest(name)
    )


def version(name: str) -> str:
    return version_name(digest(name))


def publish(output: Folder, room: Path, name: str) -> None:
    """A version as the export stage publishes it, with a whole manifest; it is current then."""
    manifest = Manifest(
        fingerprint=digest(name),
        version=version(name),
        files=(),
        created=TIMES[name],
        lineage=Lineage(
            dataset="s3://data/faq.csv",
            dataset_etag=f"etag of {name}",
            dataset_rows=len(name),
            eval_rows=2,
            columns={},
            model="org/base",
            model_revision="abc",
            hyperparameters={},
            fingerprints=prints(name),
            versions={},
        ),
        metrics={"evalLoss": float(len(name))},
        gate=GateReport(),
    )
    with Publication(output, digest(name), Reporter()) as publication:
        for path in ("gguf/model-F16.gguf", "README.md"):
            file = room / f"{name}-{Path(path).name}"
            file.write_text(f"{path} of {name}")
            publication.add(file, path)
        publication.commit(lambda files: encoded(manifest, files))


Config = dict[str, Any]


@pytest.fixture(params=["disk", *ALL_STORES])
def config(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Config:
    """A run whose dataset and model are nowhere: nobody may look for them."""
    base: Config = {
        "job": JOB,
        "model": {"source": "/gone/model"},
        "dataset": {"source": "/gone/faq.csv"},
    }
    if request.param == "disk":
        return {**base, "output": {"uri": str(tmp_path / "output")}}
    store = keys_of(request, request.param)
    use_keys(store, monkeypatch)
    bucket = f"rollback-{uuid4().hex[:8]}"
    store.client().create_bucket(Bucket=bucket)
    storage = {"endpoint": store.endpoint}
    return {**base, "output": {"uri": f"s3://{bucket}/support"}, "storage": storage}


@pytest.fixture
def output(config: Config, tmp_path: Path) -> Folder:
    """Where two versions lie, the second of which is current."""
    folder = open_folder(
        config["output"]["uri"], Storage.model_validate(config.get("storage") or {})
    )
    for name in ("one", "two"):
        publish(folder, tmp_path, name)
    return folder


def roll_back(config: Config, room: Path, to: str, **more: Any) -> StageResult:
    given = {**config, "rollbackTo": to, "output": {**config["output"], **more}}
    return prepare_stage.run(RunConfig.model_validate(given), room, Reporter())


def refusal(config: Config, room: Path, to: str) -> str:
    with pytest.raises(StageError) as caught:
        roll_back(config, room, to)
    assert caught.value.reason is Reason.VERSION_NOT_FOUND
    assert not caught.value.reason.retryable
    return caught.value.message


def test_the_former_version_is_current_and_is_told_as_if_its_spec_had_been_asked_for(
    config: Config, output: Folder, tmp_path: Path
) -> None:
    before = contents(output)
    result = roll_back(config, tmp_path, version("one"))
    after = contents(output)
    assert after[MANIFEST] == before[f"versions/{version('one')}/{MANIFEST}"]
    unchanged = {path: data for path, data in before.items() if path != MANIFEST}
    assert {p: d for p, d in after.items() if p not in (MANIFEST, "owner.json")} == unchanged
    assert result.version == version("one")
    assert result.manifest_uri == output.uri_of(f"versions/{version('one')}/{MANIFEST}")
    assert {file.path for file in result.artifacts} >= {"gguf/model-F16.gguf", "README.md"}
    assert result.complete == tuple(Stage)
    assert result.metrics == {"evalLoss": 3.0}
    resolved = result.resolved
    assert resolved is not None
    assert resolved.fingerprints == prints("one")
    assert (resolved.dataset_etag, resolved.dataset_rows) == ("etag of one", 3)
    assert [(each.version, each.current, each.eval_loss) for each in result.versions or ()] == [
        (version("two"), False, 3.0),
        (version("one"), True, 3.0),
    ]


def test_going_back_twice_and_forth_is_a_write_each(
    config: Config, output: Folder, tmp_path: Path
) -> None:
    for name in ("one", "one", "two"):
        roll_back(config, tmp_path, version(name))
        now = current(output)
        assert now is not None
        assert now.name == version(name)


def test_a_version_that_is_not_there_is_refused_with_those_that_are(
    config: Config, output: Folder, tmp_path: Path
) -> None:
    before = contents(output)
    message = refusal(config, tmp_path, "0123456789ab")
    for word in ("spec.rollbackTo", "0123456789ab is not there", version("one"), version("two")):
        assert word in message
    output.delete([f"versions/{version('one')}/README.md"])
    message = refusal(config, tmp_path, version("one"))
    assert f"{version('one')} is not whole" in message
    assert f"versions/{version('one')}/README.md" in message
    now = current(output)
    assert now is not None
    assert now.data == before[MANIFEST], "the current version stays"


def test_a_name_that_leads_out_of_the_folder_is_no_version(
    config: Config, output: Folder, tmp_path: Path
) -> None:
    output.write(MANIFEST, output.read(f"versions/{version('one')}/{MANIFEST}") or b"")
    assert "../../one is not there" in refusal(config, tmp_path, "../../one")


def test_keeping_one_version_deletes_neither_this_nor_the_newest(
    config: Config, output: Folder, tmp_path: Path
) -> None:
    roll_back(config, tmp_path, version("one"), keepVersions=1)
    assert [each.name for each in list_versions(output)] == [version("two"), version("one")]
    # Whoever prunes now, the one that is current stays.
    prune(output, 1, prints("one"))
    assert [each.name for each in list_versions(output)] == [version("one")]


def test_without_rollback_the_version_of_the_spec_is_current_again(
    config: Config, output: Folder, tmp_path: Path
) -> None:
    roll_back(config, tmp_path, version("one"))
    keep = Output(uri=config["output"]["uri"], keep_versions=2)
    found = make_current_and_prune(output, keep, prints("two"))
    assert found is not None
    now = current(output)
    assert now is not None
    assert now.name == version("two")
    assert len(list_versions(output)) == 2
