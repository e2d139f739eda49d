"""What `list` and `watch` draw, at any width."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from io import BytesIO, StringIO, TextIOWrapper
from typing import Any

import pytest
from rich.console import Console

from finetune_cli.commands.jobs import COLUMNS
from finetune_cli.curve import draw
from finetune_cli.frame import frame, losses_in
from finetune_cli.job import Job
from finetune_cli.output import age, show_table

NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)
LOSSES = [(float(step), 4.0 / step) for step in range(1, 41)]


def job(**status: Any) -> Job:
    meta = {"name": "support", "namespace": "team", "uid": "u", "generation": 1}
    known = {"observedGeneration": 1, "phase": "Training", "stage": "train"}
    return Job({"metadata": meta, "spec": {}, "status": {**known, **status}})


RUNNING = job(
    stages=[
        {"name": "prepare", "state": "Succeeded", "cached": True, "why": "the store holds it"},
        {"name": "train", "state": "Running", "attempt": 1},
        {"name": "export", "state": "Pending"},
    ],
    progress={
        "stage": "train",
        "percent": "42%",
        "step": 42,
        "totalSteps": 100,
        "loss": 1.25,
        "eta": "4m10s",
    },
    notices=[{"code": "LossFlat", "evidence": "1.2 for 40 steps.", "remedy": "Raise the rate."}],
)
EVENT = {
    "type": "Normal",
    "reason": "StageStarted",
    "message": "Started train, attempt 1.",
    "lastTimestamp": "2026-11-30T11:59:50Z",
}


def drawn(shown: Job, width: int) -> str:
    out = Console(file=StringIO(), width=width, color_system=None)
    out.print(frame(shown, LOSSES, [EVENT], width, NOW))
    assert isinstance(out.file, StringIO)
    return out.file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_picture_fits_the_terminal(width: int) -> None:
    text = drawn(RUNNING, width)
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    for part in ("42%", "step 42/100", "4m10s left", "LossFlat", "StageStarted", "cached: the"):
        assert part in words


def test_a_terminal_without_unicode_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(BytesIO(), encoding="ascii"))
    text = drawn(RUNNING, 80)
    assert text.isascii()
    assert "###" in text
    assert "*" in text


def test_the_curve_falls_from_the_upper_left_to_the_lower_right() -> None:
    lines = draw([(0, 2.0), (10, 1.0)], 48, 4, ascii_only=True).splitlines()
    assert [line.rstrip() != "" for line in lines] == [True] * 4
    assert lines[0].split()[0] == "2"
    assert lines[-1].split()[0] == "1"
    starts = [line.index("*") for line in lines]
    assert starts == sorted(starts)
    assert all(len(line) <= 48 for line in lines)


@pytest.mark.parametrize(
    ("points", "width"),
    [([], 80), ([(1, 2.0)], 80), ([(1, 2.0), (2, float("nan"))], 80), (LOSSES, 10)],
    ids=["none", "one", "not a number", "no room"],
)
def test_there_is_no_curve_without_points_or_room(
    points: list[tuple[float, float]], width: int
) -> None:
    assert draw(points, width, 7) == ""


def test_a_flat_loss_is_a_line() -> None:
    assert "⠉" in draw([(1, 1.0), (5, 1.0)], 40, 3)


def test_losses_are_read_from_both_kinds_of_log() -> None:
    log = (
        "12:00:01 step 5/40  epoch 0.50  loss 2.1000  learning rate 1.00e-04  9 tokens/s  1m left\n"
        '{"message": "step 10/40  epoch 1.00  loss 1.9000  learning rate 1e-4", "level": "info"}\n'
        "12:00:02 evaluation: step 10 loss 1.8 perplexity 6.05\n"
        "12:00:03 step 15/40  epoch 1.50  loss broken\n"
    )
    assert losses_in(log) == [(5.0, 2.1), (10.0, 1.9)]


def test_a_job_that_nobody_has_looked_at_yet() -> None:
    text = drawn(Job({"metadata": {"name": "new", "namespace": "team"}, "spec": {}}), 80)
    assert "team/new  Pending" in text


@pytest.mark.parametrize(
    ("status", "settled"),
    [
        ({"phase": "Succeeded"}, True),
        ({"phase": "Failed"}, True),
        ({"phase": "Training"}, False),
        ({"phase": "Succeeded", "observedGeneration": 0}, False),
        ({"phase": "Suspended"}, True),
    ],
)
def test_when_there_is_nothing_more_to_wait_for(status: dict[str, Any], settled: bool) -> None:
    assert job(**status).settled is settled


def test_a_request_to_try_again_is_waited_for() -> None:
    waiting = job(phase="Failed", lastHandledRetryAt="before")
    waiting.raw["metadata"]["annotations"] = {"finetune.dev/retry-requested-at": "now"}
    assert not waiting.settled
    waiting.status["lastHandledRetryAt"] = "now"
    assert waiting.settled


def listed(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    row = ["support", "Training", "", "train", "42%", "1.25", "4m10s", "0123456789ab", "5m"]
    show_table(COLUMNS, [row])
    return capsys.readouterr().out


def test_a_narrow_terminal_has_fewer_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, narrow = (listed(width, capsys, monkeypatch) for width in (100, 40))
    assert wide.split()[:3] == ["NAME", "PHASE", "REASON"]
    assert "0123456789ab" in wide
    assert "VERSION" not in narrow
    assert {"NAME", "PHASE", "PROGRESS"} <= set(narrow.split())
    assert max(map(len, narrow.splitlines())) <= 40


@pytest.mark.parametrize(
    ("seconds", "said"), [(5, "5s"), (119, "119s"), (120, "2m"), (7200, "2h"), (90000, "1d")]
)
def test_ages(seconds: int, said: str) -> None:
    then = datetime.fromtimestamp(NOW.timestamp() - seconds, UTC).isoformat()
    assert age(then, NOW) == said
