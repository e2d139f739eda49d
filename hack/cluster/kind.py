"""A cluster by kind, on machines where Docker runs."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path

from hack import state_dir
from hack.cluster import binaries, versions
from hack.process import CommandFailed, Unavailable, output, run
from hack.progress import step

NODE_IMAGES = {
    33: "v1.33.12@sha256:3f5c8443c620245e4d355cfe09e96a91ead32ceaa569d3f1ca9edf0cb2fe2ff4",
    34: "v1.34.11@sha256:44e222ee2132dab25ff87301682f89eb82c7880ea3a1bf543bfe9708fd08d67d",
    35: "v1.35.8@sha256:07b2536e30b803ed61d1677a79df6115f798ce64c80f9e22f6ed45afd09323c0",
    36: "v1.36.4@sha256:099e049362a1526b2db71494e1947aae99bd16290d7c895f2b7ea312e3cbfaed",
    37: "v1.37.0@sha256:a1ed56cfb0e7b93589bdf97c8cd566405a265939e3620fc4f5de89adff580ae5",
}
"""Tags of kindest/node by minor version: those that kind 0.33 was released with, and 0.32 for 1.33,
which 0.33 leaves out."""


def node_image() -> str | None:
    """The image of the minor version that K8S asks for; None leaves the choice to kind."""
    minor = versions.asked_minor()
    if minor is None:
        return None
    tag = NODE_IMAGES.get(minor)
    if tag is None:
        supported = f"1.{versions.MINORS[0]} to 1.{versions.MINORS[-1]}"
        raise Unavailable(f"kind runs {supported} here, not 1.{minor}")
    return f"kindest/node:{tag}"


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
            versions.require_running(self._minor_version())
            return
        self.down()
        create = ["kind", "create", "cluster", "--name", self.cluster, "--wait", "180s"]
        if image := node_image():
            create += ["--image", image]
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

    def _minor_version(self) -> int:
        server = json.loads(self.kubectl("version", "-o", "json"))["serverVersion"]
        return int(server["minor"].rstrip("+"))

    def load_image(self, archive: Path, ref: str) -> None:
        """Load a docker-archive into the node."""
        with step(f"Loading {ref} into the cluster"):
            load = ["kind", "load", "image-archive", str(archive), "--name", self.cluster]
            run(load, log=self.log)

    def kubectl(self, *args: str, input: str | None = None) -> str:  # noqa: A002 - as subprocess
        """Run kubectl as the administrator and return what it printed."""
        command = [str(binaries.kubectl()), "--kubeconfig", str(self.kubeconfig), *args]
        return output(command, input=input)
