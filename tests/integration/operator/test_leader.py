"""Two operators: one acts, and the other takes its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from finetune_trainer.contract import Stage
from hack.cluster.control_plane import ControlPlane
from hack.operator_process import NAMESPACE, RELEASE, Operator
from hack.process import wait_until
from tests.integration.operator.stage import (
    SECONDS,
    Namespace,
    exported,
    new_namespace,
    prepared,
    trained,
)

LONG = "300"
"""Seconds of a Lease that no test waits out: who leads then was given it."""

Pair = Callable[..., tuple[Operator, Operator]]


@pytest.fixture
def here(installed: ControlPlane) -> Iterator[Namespace]:
    """An empty namespace."""
    with new_namespace(installed) as namespace:
        yield namespace


@pytest.fixture
def two(installed: ControlPlane, tmp_path: Path) -> Iterator[Pair]:
    """Starts two operators, of which the first leads."""
    pair: list[Operator] = []

    def start(lease_seconds: str) -> tuple[Operator, Operator]:
        for name in ("first", "second"):
            folder = tmp_path / name
            folder.mkdir()
            operator = Operator(installed, folder, FINETUNE_LEASE_SECONDS=lease_seconds)
            operator.start()
            pair.append(operator)
            if name == "first":
                wait_until(operator.leads, what="a leader", seconds=SECONDS)
        return pair[0], pair[1]

    yield start
    for operator in pair:
        operator.wake()
        operator.kill()
    installed.kubectl("delete", "lease", RELEASE, "-n", NAMESPACE)


def transitions(plane: ControlPlane) -> int:
    """How often the Lease has changed hands."""
    path = "jsonpath={.spec.leaseTransitions}"
    return int(plane.kubectl("get", "lease", RELEASE, "-n", NAMESPACE, "-o", path))


def led_by(operator: Operator) -> Callable[[], bool]:
    def leads() -> bool:
        try:
            return operator.leads()
        except httpx.HTTPError:
            return False

    return leads


def test_one_acts_and_hands_over_when_it_is_told_to_end(two: Pair, here: Namespace) -> None:
    first, second = two(LONG)
    before = transitions(here.plane)
    here.apply()
    here.succeed(prepared())
    here.wait_phase("Training")
    assert (first.leads(), second.leads()) == (True, False)
    assert "Started" not in second.log.read_text()
    first.stop()
    wait_until(led_by(second), what="the second to lead", seconds=SECONDS)
    here.succeed(trained())
    here.succeed(exported())
    here.wait_phase("Succeeded")
    assert transitions(here.plane) == before + 1
    assert [attempt for _, attempt in here.jobs()] == [1, 1, 1]


def test_one_that_is_killed_is_replaced(two: Pair, here: Namespace) -> None:
    first, second = two("3")
    here.apply()
    here.pod(Stage.PREPARE)
    first.kill()
    here.succeed(prepared())
    here.wait_phase("Training")
    assert second.leads()


def test_one_that_sleeps_through_a_change_of_leaders_does_not_act(
    two: Pair, here: Namespace
) -> None:
    first, second = two("3")
    here.apply()
    here.pod(Stage.PREPARE)
    first.pause()
    wait_until(led_by(second), what="the second to lead", seconds=SECONDS)
    here.succeed(prepared())
    here.wait_phase("Training")
    begun = here.stage(Stage.TRAIN)
    first.wake()
    wait_until(lambda: "may lead by now" in first.log.read_text(), what="it", seconds=SECONDS)
    assert not first.leads()
    assert here.stage(Stage.TRAIN) == begun
    here.succeed(trained())
    here.succeed(exported())
    here.wait_phase("Succeeded")
    assert [attempt for _, attempt in here.jobs()] == [1, 1, 1]
    second.kill()
    wait_until(led_by(first), what="the first to lead again", seconds=SECONDS)
