"""What a Reporter hands to its publisher: typed changes, and the merge patch made of them."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from finetune_trainer.contract import Notice, NoticeCode, Progress, Stage
from finetune_trainer.runtime.reporter import Reporter

RISING = Notice(code=NoticeCode.LOSS_RISING, evidence="loss 1 to 2", remedy="Lower it.")


class Status:
    """Applies merge patches as the API server does, once it may."""

    def __init__(self, failures: int = 0) -> None:
        self.fields: dict[str, Any] = {}
        self.tried = threading.Event()
        self._failures = failures

    def publish(self, changes: Progress) -> None:
        self.tried.set()
        if self._failures:
            self._failures -= 1
            raise ConnectionError("not now")
        merged = {**self.fields, **changes.merge_patch()}
        self.fields = {key: value for key, value in merged.items() if value is not None}

    def close(self) -> None:
        pass


def test_a_patch_has_the_fields_that_were_set_and_null_clears_one() -> None:
    changes = Progress(total_steps=3, eta=None).updated(Progress(eval_loss=1.5, notices=()))
    assert changes.merge_patch() == {
        "totalSteps": 3,
        "eta": None,
        "evalLoss": 1.5,
        "notices": None,
    }
    assert Progress(notices=(RISING,)).merge_patch() == {
        "notices": [{"code": "LossRising", "evidence": "loss 1 to 2", "remedy": "Lower it."}]
    }
    assert Progress().merge_patch() == {}


@pytest.mark.parametrize("failures", [0, 1])
def test_a_new_stage_clears_what_no_longer_applies(failures: int) -> None:
    status = Status(failures)
    with Reporter(status, interval=0) as reporter:
        reporter.begin(Stage.TRAIN, "Training")
        assert status.tried.wait(5)
        reporter.steps(3, 9, eta_seconds=60)
        reporter.evaluation(3, 1.5)
        reporter.notice(RISING)
        reporter.done("Trained")
        reporter.begin(Stage.EXPORT, "Merging")
    assert status.fields.pop("lastUpdateTime").endswith("Z")
    assert status.fields == {
        "stage": "export",
        "message": "Merging",
        "evalLoss": 1.5,
        "notices": [{"code": "LossRising", "evidence": "loss 1 to 2", "remedy": "Lower it."}],
    }

    with Reporter(status, interval=0) as reporter:
        reporter.begin(Stage.TRAIN, "Training anew")
    assert status.fields.pop("lastUpdateTime")
    assert status.fields == {"stage": "train", "message": "Training anew"}


def test_a_trainer_that_lives_renews_its_report() -> None:
    status, times = Status(), set[str]()
    with Reporter(status, interval=0, heartbeat=0.05) as reporter:
        reporter.begin(Stage.TRAIN, "Training")
        deadline = time.monotonic() + 10
        while len(times) < 2 and time.monotonic() < deadline:
            if at := status.fields.get("lastUpdateTime"):
                times.add(at)
            time.sleep(0.01)
    assert len(times) == 2
    assert status.fields["message"] == "Training"


def test_a_report_that_failed_is_sent_with_the_next_heartbeat() -> None:
    status = Status(failures=2)
    with Reporter(status, interval=0, heartbeat=1) as reporter:
        reporter.begin(Stage.TRAIN, "Training")
        deadline = time.monotonic() + 10
        while not status.fields and time.monotonic() < deadline:
            time.sleep(0.01)
        assert status.fields["message"] == "Training"
        assert status.fields["heartbeatSeconds"] == 1
