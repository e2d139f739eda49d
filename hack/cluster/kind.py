"""A cluster by kind, on machines where Docker runs."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path

from hack import state_dir
from hack.cluster import binaries
from hack.process import CommandFailed, Unavailable, output, run
from hack.progress import step


class KindCluster:
    """One kind cluster, named after the project so that it meets no other."""

    name = "kind"

    def __init__(self, name: str) -> None:
        self.cluster = f"finetune-{name}"
        self.folder = state_dir(f"kind-{name}")
        self.log = self.folder / "logs" / "kind.log"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig; kind's own merge into ~/.kube is not used."""
        return self.folder / "kubeconfig"

    @property
    def node_address(self) -> str:
        """The machine's address in Docker's network `kind`."""
        found = json.loads(output(["docker", "network", "inspect", "kind"]))
        gateways = [entry.get("Gateway", "") for entry in found[0]["IPAM"]["Config"]]
        for gateway in gateways:
            if gateway and ipaddress.ip_address(gateway).version == 4:
                return str(gateway)
        raise Unavailable("Docker's network `kind` has no IPv4 gateway")

    def announce(self) -> list[str]:
        """What `up` will do outside of the project's folder."""
        return [f"create the kind cluster {self.cluster} (a Docker container and network `kind`)"]

    def up(self) -> None:
        """Create the cluster unless it is there and healthy."""
        if self.healthy():
            return
        self.down()
        create = ["kind", "create", "cluster", "--name", self.cluster, "--wait", "180s"]
        with step(f"Creating the kind cluster {self.cluster}") as current:
            target = ["--kubeconfig", str(self.kubeconfig)]
            run([*create, *target], log=self.log, on_line=current.detail)

    def down(self) -> None:
        """Delete the cluster, if it is there."""
        if self.cluster in output(["kind", "get", "clusters"]).split():
            target = ["--kubeconfig", str(self.kubeconfig)]
            run(["kind", "delete", "cluster", "--name", self.cluster, *target], log=self.log)
        self.kubeconfig.unlink(missing_ok=True)

    def healthy(self) -> bool:
        """Whether the cluster answers and its node is ready."""
        if not self.kubeconfig.exists():
            return False
        try:
            self.kubectl("wait", "--for=condition=Ready", "nodes", "--all", "--timeout=10s")
        except CommandFailed:
            return False
        return True

    def load_image(self, archive: Path, ref: str) -> None:
        """Load a docker-archive into the node."""
        with step(f"Loading {ref} into the cluster"):
            load = ["kind", "load", "image-archive", str(archive), "--name", self.cluster]
            run(load, log=self.log)

    def kubectl(self, *args: str, input: str | None = None) -> str:  # noqa: A002 - as subprocess
        """Run kubectl as the administrator and return what it printed."""
        command = [str(binaries.kubectl()), "--kubeconfig", str(self.kubeconfig), *args]
        return output(command, input=input)
