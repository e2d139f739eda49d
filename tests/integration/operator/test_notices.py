"""What the trainer says of the data and of itself, as the user sees it."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_trainer.contract import BadRow, DatasetSummary, Notice, NoticeCode, Reason, Stage
from hack.cluster.control_plane import ControlPlane
from hack.operator_process import Operator
from tests.integration.operator.stage import Namespace, prepared, resolved, trained

PREPARE, TRAIN = Stage.PREPARE, Stage.TRAIN
NEW_TRAIN = resolved(train="train-b", export="export-b")
RISING = Notice(
    code=NoticeCode.LOSS_RISING,
    step=40,
    evidence="loss 1.2 at step 20, 3.4 at step 40",
    remedy="Lower spec.training.learningRate.",
)
HALVED = Notice(
    code=NoticeCode.BATCH_HALVED,
    step=41,
    evidence="CUDA ran out of memory",
    remedy="batchSize is 1 now, gradientAccumulationSteps 8.",
)
RESUMED = Notice(code=NoticeCode.RESUMED, evidence="checkpoint of step 30", remedy="Nothing.")


UNHEARD = Notice(
    code="GradientNoisy", step=50, evidence="a sign that this release doesn't know", remedy="Look."
)


def written(*notices: Notice) -> list[dict[str, Any]]:
    return [each.model_dump(mode="json", exclude_none=True) for each in notices]


def told(here: Namespace) -> list[tuple[str, str, str, int]]:
    """The Events that notices became, oldest first."""
    codes = {str(code) for code in NoticeCode} | {UNHEARD.code}
    mine = [each for each in here.whole_events() if each["reason"] in codes]
    mine.sort(key=lambda each: int(each["metadata"]["resourceVersion"]))
    return [(each["type"], each["reason"], each["message"], each["count"]) for each in mine]


SAID_RISING = (
    "Warning",
    "LossRising",
    "step 40: loss 1.2 at step 20, 3.4 at step 40. Lower spec.training.learningRate.",
    1,
)
SAID_HALVED = (
    "Warning",
    "BatchHalved",
    "step 41: CUDA ran out of memory. batchSize is 1 now, gradientAccumulationSteps 8.",
    1,
)
SAID_RESUMED = ("Normal", "Resumed", "checkpoint of step 30. Nothing.", 1)


def test_each_notice_is_one_event_live_and_stands_in_status(
    here: Namespace, operator: Operator
) -> None:
    here.apply()
    here.succeed(prepared())
    pod = here.start_pod(TRAIN)
    here.report(pod, percent="40%", notices=written(RISING))
    here.wait("the notice", lambda: here.status().get("notices") == written(RISING))
    assert told(here) == [SAID_RISING]
    assert "LossRising" in here.condition("Progressing")[2]
    assert here.condition("Degraded")[0] == "False"

    operator.kill()  # whoever takes over doesn't say it again
    here.report(pod, percent="50%", notices=written(RISING, HALVED))
    operator.start()
    here.wait("the second", lambda: here.status()["notices"] == written(RISING, HALVED))
    assert told(here) == [SAID_RISING, SAID_HALVED]

    here.succeed(trained(notices=(RISING, RESUMED)))
    here.wait_phase("Exporting")
    assert here.status()["notices"] == written(RISING, HALVED, RESUMED)
    assert told(here) == [SAID_RISING, SAID_HALVED, SAID_RESUMED]


def test_another_training_begins_without_the_notices_of_the_last(here: Namespace) -> None:
    here.apply()
    here.succeed(prepared())
    here.report(here.start_pod(TRAIN), notices=written(RISING))
    here.wait("the notice", lambda: here.status().get("notices"))
    here.apply(training={"learningRate": 1e-5})
    here.succeed(prepared(PREPARE, found=NEW_TRAIN))
    here.wait("the other training", lambda: here.stage(TRAIN)["fingerprint"] == "train-b")
    new = here.wait("its pod", lambda: _pod_of(here, "train-b"))
    assert here.status()["progress"]["notices"] == written(RISING)  # the old trainer's last word
    assert here.status()["notices"] == []
    here.report(new, notices=written(RISING))
    here.wait("the same notice of another training", lambda: here.status()["notices"])
    assert told(here) == [SAID_RISING, SAID_RISING]


def test_what_only_a_newer_trainer_knows_of_is_passed_on_all_the_same(here: Namespace) -> None:
    """The pod's image may be newer than the definition and the operator."""
    here.apply()
    here.succeed(prepared())
    pod = here.start_pod(TRAIN)
    here.report(pod, percent="40%", notices=written(UNHEARD))
    here.wait("the notice", lambda: here.status().get("notices") == written(UNHEARD))
    here.report(pod, percent="50%", notices=written(UNHEARD, RISING))
    here.wait("the next", lambda: here.status()["notices"] == written(UNHEARD, RISING))
    assert here.status()["progress"]["percent"] == "50%"
    here.succeed(trained(notices=(UNHEARD, RISING)))
    here.wait_phase("Exporting")
    said = "step 50: a sign that this release doesn't know. Look."
    assert told(here) == [("Warning", "GradientNoisy", said, 1), SAID_RISING]


def _pod_of(here: Namespace, key: str) -> Any:
    jobs = {
        job["metadata"]["name"]
        for job in here.children("jobs")
        if job["metadata"]["annotations"]["finetune.dev/key"] == key
    }
    pods = here.children("pods")
    owned = (pod for pod in pods if pod["metadata"]["ownerReferences"][0]["name"] in jobs)
    return next(owned, None)


def test_rows_that_cannot_be_used_are_in_status(here: Namespace) -> None:
    bad = tuple(BadRow(row=number, cause="the response is empty") for number in range(2, 12))
    summary = DatasetSummary(rows=120, invalid=14, duplicates=3, first_invalid=bad)
    here.apply()
    here.fail(PREPARE, Reason.INVALID_ROWS, "14 of 120 rows can't be used.", dataset=summary)
    dataset = here.wait_phase("Failed")["dataset"]
    assert (dataset["rows"], dataset["invalid"], dataset["duplicates"]) == (120, 14, 3)
    assert dataset["firstInvalid"] == [
        {"row": number, "cause": "the response is empty"} for number in range(2, 12)
    ]

    here.apply(dataset={"source": "s3://data/mended.csv"})
    here.succeed(prepared().model_copy(update={"dataset": DatasetSummary(rows=106, examples=100)}))
    here.wait_phase("Training")
    dataset = here.status()["dataset"]
    assert (dataset["rows"], dataset["examples"]) == (106, 100)
    assert not dataset.get("firstInvalid")


@pytest.mark.parametrize("columns", ["", "wide"])
def test_the_table_shows_the_loss(here: Namespace, columns: str, installed: ControlPlane) -> None:
    here.run_all()
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{here.name}/finetunejobs/support/status"
    here.merge_patch(path, {"status": {"metrics": {"evalLoss": 1.25}}})
    options = ["-o", columns] if columns else []
    table = installed.kubectl("get", "ftj", "support", "-n", here.name, *options)
    assert ("EVALLOSS" in table and "1.25" in table) is bool(columns)
