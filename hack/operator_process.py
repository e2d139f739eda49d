"""The operator as a process of its own, with the token of its chart's ServiceAccount."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helm_python as helm
import httpx
import yaml

from hack import REPOSITORY
from hack.cluster.control_plane import ControlPlane
from hack.cluster.versions import MINORS
from hack.process import ClusterError, wait_until

NAMESPACE = "finetune-system"
RELEASE = "finetune-operator"
CHART = Path("charts/finetune-operator")
READY_SECONDS = 120  # of which a busy machine takes most for the imports
SECRET_GRACE_SECONDS = 2


def chart_objects(checkout: Path = REPOSITORY, **values: Any) -> list[dict[str, Any]]:
    """What an install of the chart makes with these values."""
    with helm.Chart.load(checkout / CHART) as chart:
        rendered = chart.render(values, name=RELEASE, namespace=NAMESPACE)
    texts = [text for name, text in rendered.items() if name.endswith(".yaml")]
    documents = [doc for text in texts for doc in yaml.safe_load_all(text) if doc]
    return [each for each in documents if not is_hook(each)]


def is_hook(document: dict[str, Any]) -> bool:
    """Whether it is one of `helm test`, which no install makes."""
    return "helm.sh/hook" in document["metadata"].get("annotations", {})


def install(plane: ControlPlane, checkout: Path = REPOSITORY) -> None:
    """Apply all of the chart but its Deployment: definition, ServiceAccount, rights, policies."""
    protected = plane.minor_version in MINORS  # there are no such policies in 1.20
    objects = chart_objects(checkout, admission={"protectStatus": protected})
    wanted = [each for each in objects if each["kind"] != "Deployment"]
    plane.kubectl("create", "namespace", NAMESPACE)
    plane.apply_definitions("-", input=yaml.safe_dump_all(wanted))


class Operator:
    """Starts, kills and stops it; its log is kept for the message of a failed test.

    `checkout` may be another version's. `settings` are environment variables.
    """

    def __init__(
        self, plane: ControlPlane, folder: Path, checkout: Path = REPOSITORY, **settings: str
    ) -> None:
        self.log = folder / "operator.log"
        self.port = _free_port()
        kubeconfig = plane.kubeconfig_for_service_account(NAMESPACE, RELEASE)
        self._environment: Mapping[str, str] = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(checkout / each) for each in ("operator", "trainer")),
            "KUBECONFIG": str(kubeconfig),
            "FINETUNE_TRAINER_IMAGE": "trainer:test",
            "FINETUNE_HEALTH_PORT": str(self.port),
            "FINETUNE_SECRET_GRACE_SECONDS": str(SECRET_GRACE_SECONDS),
            "FINETUNE_LOG_FORMAT": "human",
            "FINETUNE_LEASE": f"{NAMESPACE}/{RELEASE}",
            "FINETUNE_IDENTITY": f"operator-{self.port}",
            **settings,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def reach_through(self, port: int, scheme: str = "https") -> None:
        """Reach the API server by another port of this machine."""
        known = yaml.safe_load(Path(self._environment["KUBECONFIG"]).read_text())
        for each in known["clusters"]:
            each["cluster"]["server"] = f"{scheme}://127.0.0.1:{port}"
        target = self.log.with_name("proxied.kubeconfig")
        target.write_text(yaml.safe_dump(known))
        self._environment = {**self._environment, "KUBECONFIG": str(target)}

    def start(self, *, wait: bool = True) -> None:
        """Start it, and wait until it is ready."""
        command = [sys.executable, "-W", "error", "-m", "finetune_operator.main"]
        with self.log.open("ab") as sink:
            self._process = subprocess.Popen(
                command, env=self._environment, stdout=sink, stderr=subprocess.STDOUT
            )
        if wait:
            wait_until(self.ready, what=f"the operator (log: {self.log})", seconds=READY_SECONDS)

    def ready(self) -> bool:
        """Whether it says that it is ready; fails when it has ended."""
        if self._process is None or self._process.poll() is not None:
            raise ClusterError(f"the operator has ended:\n{self.log.read_text()}")
        try:
            return self.get("/readyz").is_success
        except httpx.HTTPError:
            return False

    def has_ended(self) -> bool:
        """Whether it has ended by itself."""
        return self._process is not None and self._process.poll() is not None

    def is_alive(self) -> bool:
        """Whether it was started, and has neither ended nor been killed."""
        return self._process is not None and self._process.poll() is None

    def get(self, path: str) -> httpx.Response:
        """Ask one of its probes."""
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", trust_env=False, timeout=5)

    def kill(self) -> None:
        """End it as a node that fails does."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """End it as Kubernetes does; its exit code."""
        return self._end(signal.SIGTERM)

    @property
    def pid(self) -> int:
        """Its process; raises ClusterError where it doesn't run."""
        if self._process is None:
            raise ClusterError("the operator was not started")
        return self._process.pid

    def pause(self) -> None:
        """Stop it in the middle of whatever it does, as a machine that hangs does."""
        self._send(signal.SIGSTOP)

    def wake(self) -> None:
        """Let it go on where it was stopped."""
        self._send(signal.SIGCONT)

    def leads(self) -> bool:
        """Whether it is the one that acts, by its own word."""
        return "finetune_leader 1.0" in self.get("/metrics").text

    def _send(self, what: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(what)

    def _end(self, how: signal.Signals) -> int:
        if self._process is None:
            return 0
        self._process.send_signal(how)
        code = self._process.wait(timeout=20)
        self._process = None
        return code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
