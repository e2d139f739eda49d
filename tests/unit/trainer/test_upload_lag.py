"""How far a training runs ahead of the store: whatever the store's pace, one interval at most."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.train.recipe import saving
from finetune_trainer.train.recipe.saving import UploadLag


@dataclass
class Store:
    """What the stage says of it."""

    step: int | None = 0

    def __call__(self) -> int | None:
        return self.step


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def due(steps: int | None, count: int) -> list[int]:
    """The steps of which a checkpoint is written, where nobody has to wait."""
    found, ahead = [], UploadLag(steps, Store(None))
    for step in range(1, count + 1):
        if ahead.is_due(step):
            ahead.add_written(step)
            found.append(step)
        assert not ahead.must_wait()
    return found


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(10, [5, 10, 15, 20]), (5, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]), (50, [])],
)
def test_a_checkpoint_is_written_every_half_interval(steps: int, expected: list[int]) -> None:
    assert due(steps, 20) == expected
    assert due(1, 3) == [1, 2, 3]


def test_the_training_waits_where_the_store_is_an_interval_behind() -> None:
    store = Store(0)
    ahead = UploadLag(10, store)
    ahead.add_written(5)
    assert not ahead.must_wait()
    assert [step for step in range(6, 11) if ahead.is_due(step)] == [10]
    ahead.add_written(10)
    assert ahead.must_wait(), "ten steps would be lost"
    store.step = 5
    assert not ahead.must_wait()
    store.step = 10
    ahead.add_written(15)
    assert not ahead.must_wait()


def test_after_a_failed_worker_what_is_only_on_disk_does_not_count() -> None:
    store = Store(4)
    ahead = UploadLag(10, store)
    ahead.start_from(12)
    assert [step for step in (13, 14) if ahead.is_due(step)] == [14], "ten after the fourth"
    ahead.add_written(14)
    assert ahead.must_wait()
    store.step = 12
    assert not ahead.must_wait()


def test_without_a_number_of_steps_the_clock_counts() -> None:
    clock = Clock()
    store = Store(0)
    ahead = UploadLag(None, store, clock)
    ahead.start_from(0)
    clock.now += saving.INTERVAL_SECONDS / 2 - 1
    assert not ahead.is_due(7)
    clock.now += 1
    assert ahead.is_due(8)
    ahead.add_written(8)
    clock.now += saving.INTERVAL_SECONDS / 2
    assert ahead.is_due(16)
    ahead.add_written(16)
    assert ahead.must_wait()
    clock.now += 3600
    store.step = 16
    assert not ahead.must_wait(), "a long wait is no training"


def test_nobody_is_waited_for_where_nobody_uploads() -> None:
    ahead = UploadLag(1, Store(None))
    for step in range(1, 5):
        assert ahead.is_due(step)
        ahead.add_written(step)
        assert not ahead.must_wait()


@settings(max_examples=60)
@given(steps=st.integers(1, 12), pace=st.floats(0.1, 20), seed=st.integers(0, 1000))
def test_a_kill_at_any_moment_costs_one_interval_at_most(
    steps: int, pace: float, seed: int
) -> None:
    """Uploads take `pace` steps each, more or less; one at a time, and then the newest."""
    chance, store = random.Random(seed), Store()  # noqa: S311 - the store's pace
    stored, uploading, waiting, left = 0, 0, 0, 0.0
    ahead, step, waits = UploadLag(steps, store), 0, 0
    for _ in range(400):
        left -= 1
        if uploading and left <= 0:
            stored, uploading = uploading, 0
            store.step = stored
        if waiting and not uploading:
            uploading, waiting, left = waiting, 0, chance.uniform(0, 2 * pace)
        if ahead.must_wait():
            waits += 1
            continue
        step += 1
        assert step - stored <= steps
        if ahead.is_due(step):
            ahead.add_written(step)
            waiting = step
    assert step > 0
    # An upload within half an interval is never waited for.
    assert not waits or 2 * pace + 1 > steps / 2
