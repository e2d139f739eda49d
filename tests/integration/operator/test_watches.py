"""What the API server refuses for a while ends no watch for good, and no process."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_trainer.contract import Stage
from hack.cluster.control_plane import ControlPlane
from hack.operator_process import Operator
from hack.process import free_ports
from tests.integration.operator.http_proxy import HttpProxy
from tests.integration.operator.stage import Namespace, new_namespace, prepared

PREPARE, TRAIN = Stage.PREPARE, Stage.TRAIN
RIGHTS = "clusterrolebinding/finetune-operator"
SOME = 5
OUTAGE_SECONDS = 52  # a client that tries again for some time only has given up by then


@pytest.fixture
def here(installed: ControlPlane) -> Iterator[Namespace]:
    """An empty namespace."""
    with new_namespace(installed) as namespace:
        yield namespace


def test_an_outage_at_the_start_is_waited_out(
    installed: ControlPlane, here: Namespace, tmp_path: Path
) -> None:
    (port,) = free_ports("127.0.0.1", 1)
    operator = Operator(installed, tmp_path)
    operator.reach_through(port)
    operator.start(wait=False)
    try:
        here.wait("its word", lambda: "Waiting for the API server" in operator.log.read_text())
        assert not operator.ready()
        assert operator.get("/healthz").text == "ok\n"
        with HttpProxy(installed, at=port):
            here.apply()
            here.wait_phase("Preparing")
    finally:
        operator.stop()


def test_watches_that_fail_for_a_while_go_on_in_the_same_process(
    installed: ControlPlane, here: Namespace, tmp_path: Path
) -> None:
    """Those of pods are answered with 503 meanwhile, all others with 403."""
    with HttpProxy(installed) as proxy:
        operator = Operator(installed, tmp_path)
        operator.reach_through(proxy.port)
        operator.start()
        try:
            here.apply()
            pod = here.start_pod(PREPARE)
            here.wait_phase("Preparing")
            rights = json.loads(installed.kubectl("get", RIGHTS, "-o", "json"))
            del rights["metadata"]["resourceVersion"]
            installed.kubectl("delete", RIGHTS)
            proxy.failing = "/pods"
            proxy.cut()
            until = time.monotonic() + OUTAGE_SECONDS
            here.wait("what the probe says", lambda: not operator.ready())
            here.succeed(prepared())  # nobody is told
            while time.monotonic() < until:
                operator.ready()  # raises when the process has ended
                time.sleep(1)
            assert proxy.failed >= SOME
            proxy.failing = ""
            installed.kubectl("create", "-f", "-", input=json.dumps(rights))
            here.wait_phase("Training")
            here.wait("readiness", operator.ready)
            assert here.pod(TRAIN)["metadata"]["uid"] != pod["metadata"]["uid"]
            assert operator.get("/healthz").text == "ok\n"
        finally:
            operator.stop()
