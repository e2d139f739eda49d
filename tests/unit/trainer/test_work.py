"""How much of a stage's work is done: one share of all its parts, and the time that is left."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from finetune_trainer.contract import Export, Progress, Quantization, Stage
from finetune_trainer.memory.forecast import ExportWork, Machine, forecast
from finetune_trainer.runtime import Work
from finetune_trainer.runtime.child import as_steps, as_transfer
from finetune_trainer.runtime.reporter import Reporter

EIGHT = ExportWork(8e9, Export())


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Shown:
    """What people would see, each change by itself."""

    def __init__(self) -> None:
        self.progress = Progress()
        self.percents: list[int] = []
        self.sent = threading.Condition()

    def publish(self, changes: Progress) -> None:
        with self.sent:
            self.progress = self.progress.updated(changes)
            if changes.percent is not None:
                self.percents.append(int(changes.percent.rstrip("%")))
            self.sent.notify_all()

    def close(self) -> None:
        pass


def test_parts_count_by_the_seconds_that_they_should_take() -> None:
    clock = Clock()
    work = Work({"fetch": 100, "merge": 300, "check": 600}, clock)
    assert (work.share, work.seconds_left) == (0, 1000)
    clock.now = 50
    work.advance("fetch", 0.5)
    assert work.share == 0.05
    clock.now = 100
    work.advance("fetch", 1.0)
    work.advance("merge", 0.5)
    work.advance("nobody knows it", 0.5)
    assert work.share == 0.25
    # 250 predicted seconds took 100; so far the prediction counts as much as 100 seconds more.
    assert work.seconds_left == pytest.approx(750 * 200 / 350)


def test_it_never_goes_back() -> None:
    work = Work({"fetch": 1, "check": 1})
    work.advance("check", 0.5)
    work.advance("check", 0.1)
    work.advance("check", 7.0)
    assert work.share == 0.5


def test_what_needs_not_be_done_says_nothing_of_the_pace() -> None:
    clock = Clock()
    work = Work({"merge": 900, "check": 100}, clock)
    work.skip("merge")
    assert work.share == 0.9
    assert work.seconds_left == pytest.approx(100)


def test_an_exports_parts_cover_it_and_none_stands_out() -> None:
    """Of 8 billion parameters on 8 CPUs: half an hour, and what can't be seen moving is short."""
    seconds = forecast(EIGHT, Machine(8))
    assert list(seconds) == [
        *("fetch", "merge", "reference", "write source", "check source", "check adapter"),
        *("write F16", "check F16", "write Q8_0", "check Q8_0", "write Q4_K_M", "check Q4_K_M"),
        *("samples", "upload"),
    ]
    assert 600 < sum(seconds.values()) < 3600
    assert max(seconds.values()) < sum(seconds.values()) / 2
    crowded = forecast(EIGHT, Machine(8, memory=4e9))
    slower = {name for name in seconds if crowded[name] > seconds[name]}
    checks = {name for name in seconds if name.startswith("check ")}
    # Q4_K_M takes as long to compute.
    assert slower == {"reference", "samples", *checks} - {"check Q4_K_M"}


@pytest.mark.parametrize(
    ("export", "parts"),
    [
        ({"gguf": [], "merged": True}, ["fetch", "merge", "reference", "upload"]),
        ({"gguf": [], "merged": False, "mergedFp8": True}, ["fetch", "fp8", "upload"]),
        (
            {"gguf": ["Q8_0"], "merged": False, "verify": "off"},
            ["fetch", "merge", "write source", "write Q8_0", "upload"],
        ),
    ],
)
def test_what_is_not_asked_for_is_no_work(export: dict[str, Any], parts: list[str]) -> None:
    work = ExportWork(1e9, Export.model_validate(export), own=Quantization.BF16)
    assert [name for name, seconds in forecast(work, Machine(2)).items() if seconds] == parts


def test_downloads_and_programs_move_the_part_of_the_thread_that_began_them() -> None:
    """In whatever thread they are heard of, and without a step of their own (step 4/4)."""
    shown = Shown()
    with Reporter(shown, interval=0.0) as reporter:
        reporter.begin(Stage.EXPORT, "Exporting")
        reporter.expect_work({"fetch": 50, "check": 50})
        with reporter.part("fetch"):
            reporter.transfer("Fetching", 1000)(500)
        with reporter.part("check"):
            heard = as_steps(reporter), as_transfer(reporter, "Writing")
        for each in heard:
            assert each
            thread = threading.Thread(target=each, args=(4, 4))
            thread.start()
            thread.join()
        with shown.sent:
            shown.sent.wait_for(lambda: shown.progress.percent == "99%", timeout=60)
    assert shown.progress.percent == "99%", "100% is the stage's end"
    assert (shown.progress.step, shown.progress.total_steps) == (None, None)
    assert shown.progress.eta
    assert shown.percents == sorted(shown.percents)
