"""The operator may die at any time, and what it was doing goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_trainer.contract import Stage
from hack.cluster.control_plane import ControlPlane
from hack.operator_process import Operator
from tests.integration.operator.stage import Namespace, exported, new_namespace, prepared, trained

PREPARE, TRAIN, EXPORT = Stage.PREPARE, Stage.TRAIN, Stage.EXPORT


@pytest.fixture
def here(installed: ControlPlane) -> Iterator[Namespace]:
    """An empty namespace."""
    with new_namespace(installed) as namespace:
        yield namespace


def test_what_happened_while_it_was_dead_is_taken_in(here: Namespace, mortal: Operator) -> None:
    here.apply()
    here.succeed(prepared())
    here.start_pod(TRAIN)
    here.wait_phase("Training")
    mortal.kill()
    here.succeed(trained())
    mortal.start()
    here.succeed(exported())
    here.wait_phase("Succeeded")
    assert here.jobs() == [("prepare", 1), ("train", 1), ("export", 1)]
    assert here.status()["metrics"] == {"trainLoss": 0.5}


def test_a_restart_in_the_middle_of_nothing_changes_nothing(
    here: Namespace, mortal: Operator
) -> None:
    here.apply()
    here.succeed(prepared())
    pod = here.start_pod(TRAIN)["metadata"]["uid"]
    here.wait("train", lambda: here.stage(TRAIN).get("state") == "Running")
    here.wait("both pods' usage", lambda: len(here.status()["usage"]["pods"]) == 2)
    before = here.status()
    mortal.kill()
    mortal.start()
    here.apply(name="another")  # when this one is at work, the first one has been looked at
    here.wait("the other job", lambda: len(here.children("jobs")) == 3)
    assert here.pod(TRAIN)["metadata"]["uid"] == pod
    assert here.status() == before


def test_an_edit_while_it_was_dead_is_seen(here: Namespace, mortal: Operator) -> None:
    here.run_all()
    mortal.kill()
    here.apply(training={"seed": 7})
    mortal.start()
    here.succeed(prepared(PREPARE, TRAIN, EXPORT))
    assert here.wait_phase("Succeeded")["observedGeneration"] == 2


def test_deleting_while_it_is_dead_leaves_nothing_behind(here: Namespace, mortal: Operator) -> None:
    here.apply()
    here.succeed(prepared())
    here.start_pod(TRAIN)
    mortal.kill()
    here.delete()
    here.wait_until_nothing_is_left()
    mortal.start()


def test_it_ends_cleanly_when_told_to(mortal: Operator) -> None:
    assert mortal.stop() == 0


def test_it_serves_the_given_namespaces_only(
    installed: ControlPlane, here: Namespace, tmp_path: Path
) -> None:
    other = Namespace(installed, f"{here.name}-other")
    installed.kubectl("create", "namespace", other.name)
    operator = Operator(installed, tmp_path, FINETUNE_NAMESPACES=here.name)
    operator.start()
    try:
        other.apply()
        here.apply()
        here.wait_phase("Preparing")
        here.apply(training={"seed": 2})
        here.wait_phase("Preparing")
        assert other.children("jobs") == []
    finally:
        operator.stop()
        other.close()
        installed.kubectl("delete", "namespace", other.name, "--wait=false")
