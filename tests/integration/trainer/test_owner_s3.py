"""Two FineTuneJobs that name one output folder, in a bucket."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract import (
    JobReference,
    Output,
    PreparedRunConfig,
    Reason,
    Stage,
    StageError,
    StageResult,
    Storage,
)
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.stage_runner import perform
from finetune_trainer.store import open_folder
from finetune_trainer.store.marker import claim, read_owner
from hack.object_store import Credentials
from tests.integration.trainer import first_release
from tests.integration.trainer.conftest import use_keys

FIRST = {"namespace": "team", "name": "first"}
SECOND = {"namespace": "team", "name": "second"}
Prepare = Callable[..., StageResult]


@pytest.fixture
def config(moto: Credentials, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A run whose results are all there, of a release that knew no owners."""
    use_keys(moto, monkeypatch)
    first_release.upload(moto)
    yield first_release.first_config(moto.endpoint)
    first_release.remove(moto)


@pytest.fixture
def prepare(config: dict[str, Any], tmp_path: Path) -> Prepare:
    count = iter(range(100))

    def run(job: dict[str, str], **output: Any) -> StageResult:
        changed = {**config, "job": job, "output": {**config["output"], **output}}
        return first_release.prepare(changed, tmp_path / f"workspace-{next(count)}")

    return run


def refused(prepare: Prepare, job: dict[str, str], **output: Any) -> str:
    with pytest.raises(StageError) as caught:
        prepare(job, **output)
    assert caught.value.reason is Reason.OUTPUT_IN_USE
    return caught.value.message


def test_the_second_ends_with_the_name_of_the_first_and_touches_nothing(
    prepare: Prepare, config: dict[str, Any], moto: Credentials, tmp_path: Path
) -> None:
    resolved = prepare(FIRST).resolved
    assert resolved is not None
    before = first_release.keys(moto)
    uri = config["output"]["uri"]
    for spelling in (uri, f"{uri}/", uri.replace("/output", "//output")):
        assert "team/first" in refused(prepare, SECOND, uri=spelling)
    assert "team/first" in refused(prepare, {**FIRST, "namespace": "other"})
    for stage in (Stage.TRAIN, Stage.EXPORT):
        run = {**config, "job": SECOND, "resolved": resolved.model_dump()}
        with pytest.raises(StageError, match="team/first") as caught:
            perform(
                stage, PreparedRunConfig.model_validate(run), tmp_path / "workspace", Reporter()
            )
        assert caught.value.reason is Reason.OUTPUT_IN_USE
    assert first_release.keys(moto) == before
    assert prepare(FIRST).complete == (Stage.PREPARE, Stage.TRAIN, Stage.EXPORT)


def test_after_a_takeover_the_first_is_refused_and_what_it_made_is_kept(
    prepare: Prepare, moto: Credentials
) -> None:
    prepare(FIRST)
    assert "takeOverFrom names team/third" in refused(prepare, SECOND, takeOverFrom="team/third")
    before = first_release.keys(moto)
    taken = prepare(SECOND, takeOverFrom="team/first")
    assert taken.complete == (Stage.PREPARE, Stage.TRAIN, Stage.EXPORT)
    after = first_release.keys(moto)
    assert {key for key in after if after[key] != before.get(key)} == {"output/owner.json"}
    assert "team/second" in refused(prepare, FIRST)
    prepare(SECOND)


def test_of_many_at_the_same_time_one_wins(
    moto: Credentials, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_keys(moto, monkeypatch)
    settings = Output(uri=f"s3://{bucket}/owners/race")
    output = open_folder(settings.folder, Storage(endpoint=moto.endpoint))

    def attempt(number: int) -> Reason:
        try:
            claim(output, settings, JobReference(namespace="team", name=f"job-{number}"))
        except StageError as error:
            return error.reason
        return Reason.SUCCEEDED

    with ThreadPoolExecutor(6) as pool:
        found = {f"job-{n}": end for n, end in enumerate(pool.map(attempt, range(6)))}
    owner = read_owner(output)
    assert owner is not None
    assert found.pop(owner.name) is Reason.SUCCEEDED
    assert set(found.values()) == {Reason.OUTPUT_IN_USE}
    assert json.loads(output.read("owner.json") or b"")["namespace"] == "team"
