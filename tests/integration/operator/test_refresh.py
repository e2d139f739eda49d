"""`dataset.refresh` on the real API server: what is looked at again, and under which name."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_trainer.contract import Reason, Stage
from tests.integration.operator.stage import Namespace, exported, prepared, resolved, trained

PREPARE, TRAIN, EXPORT = Stage.PREPARE, Stage.TRAIN, Stage.EXPORT
HOURLY: dict[str, Any] = {"source": "s3://data/faq.csv", "refresh": "1h"}
NEW_DATA = resolved(train="train-b", export="export-b")


def finish_once(here: Namespace) -> dict[str, Any]:
    """A finished job that looks every hour."""
    here.apply(dataset=HOURLY)
    for result in (prepared(), trained(), exported()):
        here.succeed(result)
    return here.wait_phase("Succeeded")


def let_an_hour_pass(here: Namespace) -> None:
    """As if the last look had begun an hour ago."""
    stages = here.status()["stages"]
    earlier = datetime.fromisoformat(stages[0]["startTime"]) - timedelta(hours=1)
    stages[0]["startTime"] = earlier.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{here.name}/finetunejobs/support/status"
    here.merge_patch(path, {"status": {"stages": stages}})


def looks(here: Namespace) -> list[str]:
    """The keys of the Jobs of `prepare`, the oldest first."""
    jobs = [job["metadata"] for job in here.children("jobs")]
    mine = [meta for meta in jobs if meta["labels"]["finetune.dev/stage"] == "prepare"]
    return sorted(meta["annotations"]["finetune.dev/key"] for meta in mine)


def ends(status: dict[str, Any]) -> list[tuple[str, int, str]]:
    """Which attempts at `train` and `export` ended, and when."""
    return [
        (each["fingerprint"], each["attempt"], each["completionTime"])
        for each in status["stages"][1:]
    ]


def test_new_data_becomes_a_version_while_the_old_one_stays_ready(here: Namespace) -> None:
    before = finish_once(here)
    assert before["nextRefreshTime"] > before["lastRefreshTime"]
    let_an_hour_pass(here)
    here.wait_phase("Preparing")
    assert here.condition("Ready") == ("True", "Succeeded", before["conditions"][0]["message"])
    here.succeed(prepared(PREPARE, TRAIN, EXPORT))
    same = here.wait_phase("Succeeded")
    assert same["artifacts"] == before["artifacts"]
    assert ends(same) == ends(before), "no stage ran again"
    assert looks(here) == ["1", "1.1"]

    let_an_hour_pass(here)
    here.wait_phase("Preparing")
    here.succeed(prepared(PREPARE, found=NEW_DATA))
    here.succeed(trained())
    here.wait_phase("Exporting")
    assert here.condition("Ready")[0] == "True"
    assert here.status()["artifacts"] == before["artifacts"]
    here.succeed(exported())
    after = here.wait_phase("Succeeded")
    assert [each["fingerprint"] for each in after["stages"]][1:] == ["train-b", "export-b"]
    assert looks(here) == ["1", "1.1", "1.2"]
    assert here.jobs().count(("train", 1)) == 2


def test_a_look_that_fails_is_told_and_tried_again_at_the_next_interval(here: Namespace) -> None:
    before = finish_once(here)
    let_an_hour_pass(here)
    gone = "There is no s3://data/faq.csv."
    here.fail(PREPARE, Reason.DATASET_NOT_FOUND, gone)
    status = here.wait_phase("Succeeded")
    assert status["artifacts"] == before["artifacts"]
    assert here.condition("Ready")[0] == "True"
    degraded = here.condition("Degraded")
    assert degraded[:2] == ("True", "DatasetNotFound")
    assert f"The last look at dataset and model failed: {gone}" in degraded[2]
    assert status["nextRefreshTime"] in degraded[2]
    assert here.condition("Stalled")[0] == ""

    let_an_hour_pass(here)
    here.succeed(prepared(PREPARE, TRAIN, EXPORT))
    here.wait("all to be well", lambda: here.condition("Degraded")[0] == "False")
    assert here.jobs().count(("train", 1)) == 1


def test_another_revision_of_the_base_model_becomes_a_version(here: Namespace) -> None:
    before = finish_once(here)
    let_an_hour_pass(here)
    newer = NEW_DATA.model_copy(update={"model_revision": "def"})
    here.succeed(prepared(PREPARE, found=newer))
    here.succeed(trained())
    here.wait_phase("Exporting")
    train = here.stage(TRAIN)
    assert train["fingerprint"] == "train-b"
    assert train["staleBecause"] == ["model: revision abc → def"]
    assert here.status()["artifacts"] == before["artifacts"]
    here.succeed(exported())
    after = here.wait_phase("Succeeded")
    assert after["resolved"]["modelRevision"] == "def"
