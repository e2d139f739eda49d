"""What one watch shows is older than what another one does, and nothing is done twice for that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hack.chaos.promises import at_once, pod_lives
from hack.chaos.proxy import ChaosProxy
from hack.chaos.recorder import Recorder
from hack.kwok import stages
from hack.kwok.cluster import KwokCluster
from hack.operator_process import Operator
from tests.integration.operator.stage import Namespace, new_namespace

HELD_SECONDS = 8.0


@pytest.fixture
def here(kwok_cluster: KwokCluster) -> Iterator[Namespace]:
    """An empty namespace."""
    with new_namespace(kwok_cluster.plane) as namespace:
        yield namespace


def test_a_deleted_job_whose_pod_was_never_seen_has_no_second_pod_beside_it(
    kwok_cluster: KwokCluster, here: Namespace, tmp_path: Path
) -> None:
    plane = kwok_cluster.plane
    operator = Operator(plane, tmp_path)
    with ChaosProxy(plane) as proxy, Recorder(plane, here.name) as recorder:
        operator.reach_through(proxy.port, "http")
        operator.start()
        try:
            slow = {stages.RUN_FOR: "4s", stages.STOP_FOR: "5s"}
            here.apply(stages={"prepare": {"annotations": slow}})
            proxy.hold("pods", HELD_SECONDS)
            job = here.wait("a pod at work", lambda: running_job(here))
            plane.kubectl("delete", "job", job, "-n", here.name, "--wait=false")
            here.wait_phase("Succeeded")
            pods = [each for each in pod_lives(recorder.changes()) if each.stage == "prepare"]
            assert len(pods) == 2
            assert at_once(pods) == []
        finally:
            operator.stop()


def running_job(here: Namespace) -> str | None:
    """The Job of a pod that runs."""
    for pod in here.children("pods"):
        if pod["status"]["phase"] == "Running":
            return str(pod["metadata"]["ownerReferences"][0]["name"])
    return None
