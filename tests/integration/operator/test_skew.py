"""The definition of another version, on a real API server.

A watch that was there before goes on with the older definition for a minute or two, so the operator
is started anew, as its node may make it do at any time.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from finetune_trainer.contract import Stage
from hack.cluster.control_plane import ControlPlane
from hack.operator_process import Operator
from hack.process import CommandFailed
from tests.integration.operator.stage import Namespace, exported, new_namespace, prepared, trained

PREPARE, TRAIN = Stage.PREPARE, Stage.TRAIN
NAME = "crd/finetunejobs.finetune.dev"
Schema = dict[str, Any]
Replace = Callable[[Callable[[Schema], None]], AbstractContextManager[None]]


@pytest.fixture
def definition(installed: ControlPlane) -> Replace:
    """Replace the definition by a changed one, for a while."""

    @contextmanager
    def changed(change: Callable[[Schema], None]) -> Iterator[None]:
        today = json.loads(installed.kubectl("get", NAME, "-o", "json"))
        del today["metadata"]["resourceVersion"]
        other = copy.deepcopy(today)
        change(other["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"])
        installed.kubectl("replace", "-f", "-", input=json.dumps(other))
        try:
            yield
        finally:
            installed.kubectl("replace", "-f", "-", input=json.dumps(today))

    return changed


def with_a_later_field(schema: Schema) -> None:
    """A newer definition, which adds a field with a default to each object that is read."""
    training = schema["spec"]["properties"]["training"]["properties"]
    training["curriculum"] = {"type": "string", "default": "easyFirst"}


@pytest.fixture
def here(installed: ControlPlane) -> Iterator[Namespace]:
    """An empty namespace."""
    with new_namespace(installed) as namespace:
        yield namespace


def skew(here: Namespace) -> str:
    return here.condition("VersionSkew")[2]


def test_a_newer_definition_leaves_what_runs_and_what_is_done_alone(
    here: Namespace, mortal: Operator, definition: Replace
) -> None:
    here.apply()
    here.succeed(prepared())
    pod = here.start_pod(TRAIN)
    here.wait_phase("Training")
    with definition(with_a_later_field):
        here.wait("the default", lambda: "curriculum" in here.spec()["training"])
        mortal.kill()
        mortal.start()
        here.wait("the condition", lambda: "spec.training.curriculum" in skew(here))
        assert here.status()["phase"] == "Training"
        assert here.pod(TRAIN)["metadata"]["uid"] == pod["metadata"]["uid"]
        here.succeed(trained())
        here.succeed(exported())
        done = here.wait_phase("Succeeded")
        mortal.kill()
        mortal.start()
        here.apply(name="another")
        here.wait("the other job", lambda: len(here.children("jobs")) == 4)
        assert here.status() == done
    assert here.jobs() == [("prepare", 1), ("prepare", 1), ("train", 1), ("export", 1)]


@pytest.mark.usefixtures("mortal")
def test_a_definition_that_knows_fewer_phases_takes_the_word_that_it_knows(
    here: Namespace, definition: Replace
) -> None:
    def of_0_1_0(schema: Schema) -> None:
        status = schema["status"]["properties"]
        known = ["Pending", "Preparing", "Training", "Exporting", "Succeeded", "Failed"]
        status["phase"]["enum"] = known
        del status["reason"], schema["status"]["default"]

    def takes(word: str) -> bool:
        patch = json.dumps({"status": {"phase": word}})
        command = ("patch", "ftj/support", "-n", here.name, "--subresource=status", "--type=merge")
        try:
            here.plane.kubectl(*command, "--dry-run=server", "-p", patch)
        except CommandFailed:
            return False
        return True

    with definition(of_0_1_0):
        here.apply()
        here.wait("the older definition", lambda: not takes("Queued"))
        waits = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
        here.set_pod(here.pod(PREPARE), "Pending", conditions=[waits])
        here.wait("the reason", lambda: here.condition("Progressing")[1] == "Unschedulable")
        assert here.status()["phase"] == "Preparing"
        here.start_pod(PREPARE)
        here.succeed(prepared())
        here.wait_phase("Training")


def test_an_older_definition_leaves_what_runs_alone(
    here: Namespace, mortal: Operator, definition: Replace
) -> None:
    def without_fields(schema: Schema) -> None:
        """An older definition, which drops fields that the operator writes."""
        del schema["status"]["properties"]["notices"]
        del schema["status"]["properties"]["resolved"]["properties"]["plan"]
        del schema["spec"]["properties"]["training"]["properties"]["packing"]

    here.apply()
    here.succeed(prepared())
    here.start_pod(TRAIN)
    here.wait_phase("Training")
    with definition(without_fields):
        here.wait("the older one", lambda: "packing" not in here.spec()["training"])
        mortal.kill()
        mortal.start()
        here.succeed(trained())
        here.wait_phase("Exporting")
        here.succeed(exported())
        here.wait_phase("Succeeded")
        assert skew(here) == ""
    assert here.jobs() == [("prepare", 1), ("train", 1), ("export", 1)]
