"""A control plane with scheduler and kwok's nodes.

with KwokCluster(tmp_path) as cluster:
    cluster.add_node("gpu-1", gpus=8)
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hack.cluster import binaries, components
from hack.cluster.control_plane import READY_SECONDS, STOP_SECONDS, ControlPlane
from hack.kwok import stages
from hack.process import Daemon, Unavailable, wait_until

VARIABLE = "KWOK"
LEASE_SECONDS = 40  # as a kubelet's
NODE_SECONDS = 30


def program() -> Path:
    """kwok, as the variable KWOK or PATH names it; raises Unavailable where there is none."""
    named = os.environ.get(VARIABLE) or "kwok"
    found = shutil.which(named)
    if not found:
        raise Unavailable(
            f"there is no {named}: download kwok from the releases of kubernetes-sigs/kwok on "
            "GitHub, or run `go install sigs.k8s.io/kwok/cmd/kwok@v0.8.0`, and put it on PATH or "
            f"name it with {VARIABLE}"
        )
    return Path(found)


class KwokCluster:
    """The real control plane and scheduler, and nodes of which only kwok knows."""

    def __init__(self, folder: Path) -> None:
        self.plane = ControlPlane(folder)
        self._scheduler = Daemon("kube-scheduler", folder)
        self._kwok = Daemon("kwok", folder)
        self._programs: dict[str, Path] = {}

    def __enter__(self) -> Self:
        """Bring it up, without a node."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it; its data stays."""
        self.stop()

    def start(self) -> None:
        """Bring it up, without a node; raises Unavailable where a program is missing."""
        kwok = program()
        self._programs = binaries.ensure((*binaries.CONTROL_PLANE, "node"))
        self.plane.start(programs=self._programs)
        try:
            layout = self.plane.layout
            scheduler = components.scheduler(self._programs["kube-scheduler"], layout)
            self._scheduler.start(scheduler, detached=False)
            self._kwok.start(self._kwok_command(kwok), detached=False)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all of it."""
        for daemon in (self._kwok, self._scheduler):
            daemon.stop(seconds=STOP_SECONDS)
        self.plane.stop()

    def add_node(
        self,
        name: str,
        *,
        cpu: int = 1000,
        memory: str = "100Ti",
        gpus: int = 0,
        labels: Mapping[str, str] | None = None,
        taints: Sequence[Mapping[str, str]] = (),
    ) -> None:
        """Add a node of this size, and wait until pods can be put on it."""
        amounts = {"cpu": str(cpu), "memory": memory, "pods": "10000"}
        amounts["ephemeral-storage"] = "100Ti"
        if gpus:
            amounts["nvidia.com/gpu"] = str(gpus)
        node: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": name,
                "labels": {"kubernetes.io/hostname": name, **(labels or {})},
                "annotations": {stages.FAKE_NODE: "fake"},
            },
            "spec": {"taints": list(taints)} if taints else {},
            "status": {"capacity": amounts, "allocatable": amounts},
        }
        self.plane.kubectl("create", "-f", "-", input=json.dumps(node))
        wait_until(lambda: self._is_ready(name), what=f"the node {name}", seconds=NODE_SECONDS)

    def restart_apiserver(self, *, seconds_away: float = 0) -> None:
        """Kill the API server, leave it away for a time, and wait until it is ready again."""
        plane = self.plane
        plane.apiserver.stop(first=signal.SIGKILL)
        time.sleep(seconds_away)
        command = components.apiserver(self._programs["kube-apiserver"], plane.layout)
        plane.apiserver.start(command, detached=False)
        wait_until(plane.healthy, what="the API server", seconds=READY_SECONDS)

    def _is_ready(self, name: str) -> bool:
        node = json.loads(self.plane.kubectl("get", "node", name, "-o", "json"))
        told = node["status"].get("conditions") or []
        conditions = {each["type"]: each["status"] for each in told}
        taints = {each["key"] for each in node["spec"].get("taints") or []}
        return conditions.get("Ready") == "True" and "node.kubernetes.io/not-ready" not in taints

    def _kwok_command(self, kwok: Path) -> list[str]:
        config = self.plane.folder / "kwok.yaml"
        config.write_text(stages.configuration())
        values = {
            "kubeconfig": self.plane.kubeconfig,
            "config": config,
            "manage-nodes-with-annotation-selector": f"{stages.FAKE_NODE}=fake",
            "node-lease-duration-seconds": LEASE_SECONDS,
        }
        return components.command(kwok, values)
