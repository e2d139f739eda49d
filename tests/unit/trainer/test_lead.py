"""How far a training runs ahead of the store: whatever the store's pace, one interval at most."""

from __future__ import annotations

import itertools
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.train.link import upload_lag
from finetune_trainer.train.link.upload_lag import Lead, read_stored, tell_stored


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def due(steps: int | None, room: Path, count: int) -> list[int]:
    """The steps of which a checkpoint is written, where nobody has to wait."""
    found, ahead = [], Lead(steps, room)
    for step in range(1, count + 1):
        if ahead.is_due(step):
            ahead.written(step)
            found.append(step)
        assert not ahead.is_whole()
    return found


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(10, [5, 10, 15, 20]), (5, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]), (50, [])],
)
def test_a_checkpoint_is_written_every_half_interval(
    steps: int, expected: list[int], tmp_path: Path
) -> None:
    assert due(steps, tmp_path, 20) == expected
    assert due(1, tmp_path, 3) == [1, 2, 3]


def test_the_training_waits_where_the_store_is_an_interval_behind(tmp_path: Path) -> None:
    tell_stored(tmp_path, 0)
    ahead = Lead(10, tmp_path)
    ahead.written(5)
    assert not ahead.is_whole()
    assert [step for step in range(6, 11) if ahead.is_due(step)] == [10]
    ahead.written(10)
    assert ahead.is_whole(), "ten steps would be lost"
    tell_stored(tmp_path, 5)
    assert not ahead.is_whole()
    tell_stored(tmp_path, 10)
    ahead.written(15)
    assert not ahead.is_whole()


def test_after_a_failed_worker_what_is_only_on_disk_does_not_count(tmp_path: Path) -> None:
    tell_stored(tmp_path, 4)
    ahead = Lead(10, tmp_path)
    ahead.begin(12)
    assert [step for step in (13, 14) if ahead.is_due(step)] == [14], "ten after the fourth"
    ahead.written(14)
    assert ahead.is_whole()
    tell_stored(tmp_path, 12)
    assert not ahead.is_whole()


def test_without_a_number_of_steps_the_clock_counts(tmp_path: Path) -> None:
    clock = Clock()
    tell_stored(tmp_path, 0)
    ahead = Lead(None, tmp_path, clock)
    ahead.begin(0)
    clock.now += upload_lag.INTERVAL_SECONDS / 2 - 1
    assert not ahead.is_due(7)
    clock.now += 1
    assert ahead.is_due(8)
    ahead.written(8)
    clock.now += upload_lag.INTERVAL_SECONDS / 2
    assert ahead.is_due(16)
    ahead.written(16)
    assert ahead.is_whole()
    clock.now += 3600
    tell_stored(tmp_path, 16)
    assert not ahead.is_whole(), "a long wait is no training"


def test_nobody_is_waited_for_where_nobody_uploads(tmp_path: Path) -> None:
    assert read_stored(tmp_path) is None
    ahead = Lead(1, tmp_path)
    for step in range(1, 5):
        assert ahead.is_due(step)
        ahead.written(step)
        assert not ahead.is_whole()


@settings(max_examples=60)
@given(steps=st.integers(1, 12), pace=st.floats(0.1, 20), seed=st.integers(0, 1000))
def test_a_kill_at_any_moment_costs_one_interval_at_most(
    steps: int, pace: float, seed: int
) -> None:
    """Uploads take `pace` steps each, more or less; one at a time, and then the newest."""
    chance = random.Random(seed)  # noqa: S311 - the store's pace
    with tempfile.TemporaryDirectory() as folder:
        room, clock = Path(folder), Clock()
        stored, uploading, waiting, left = 0, 0, 0, 0.0
        tell_stored(room, 0)
        ahead, step, waits = Lead(steps, room), 0, 0
        for _ in range(400):
            left -= 1
            if uploading and left <= 0:
                stored, uploading = uploading, 0
                tell_stored(room, stored)
            if waiting and not uploading:
                uploading, waiting, left = waiting, 0, chance.uniform(0, 2 * pace)
            if ahead.is_whole():
                waits += 1
                continue
            step += 1
            clock.now += 1
            assert step - stored <= steps
            if ahead.is_due(step):
                ahead.written(step)
                waiting = step
        assert step > 0
        # An upload within half an interval is never waited for.
        assert not waits or 2 * pace + 1 > steps / 2


def test_the_step_is_never_read_half_written(tmp_path: Path) -> None:
    for step in itertools.chain(range(5), [1_000_000]):
        tell_stored(tmp_path, step)
        assert read_stored(tmp_path) == step
    assert [file.name for file in tmp_path.iterdir()] == [upload_lag.STORED]
