"""A cluster without Docker: the control plane on this machine, and one node in namespaces."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from hack import cache_dir, debian, state_dir
from hack.cluster import binaries, components, node_config, versions
from hack.cluster.components import NODE_NAME
from hack.cluster.control_plane import ControlPlane
from hack.cluster.node import Node, containerd_version
from hack.process import ClusterError, CommandFailed, Daemon, Unavailable, output, run, wait_until
from hack.progress import step

READY_SECONDS = 180
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
PACKAGES = {
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "buildah": "buildah",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "mount": "mount",
    "mmdebstrap": "mmdebstrap",
}
"""Packages by a program that each of them brings; one already there is used as it is."""


class NativeCluster:
    """etcd to kube-proxy as processes of this machine; needs root and a few Debian packages."""

    name = "native"

    def __init__(self, name: str) -> None:
        self.cluster = name
        self.folder = state_dir(f"native-{name}")
        self.node = Node(name, self.folder / "node")
        self.scheduler = Daemon("kube-scheduler", self.folder / "control-plane")
        self._images_file = self.folder / "images.json"

    @property
    def plane(self) -> ControlPlane:
        """The control plane, which listens on the machine's end of the node's wire."""
        return ControlPlane(self.folder / "control-plane", address=self.node_address)

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.folder / "control-plane" / "admin.kubeconfig"

    @property
    def node_address(self) -> str:
        """The machine's address that pods reach; it exists while the cluster is up."""
        return self.node.network.host_address

    def announce(self) -> list[str]:
        """What `up` will do outside of the project's and the user's cache folder."""
        missing = system_packages_missing()
        install = [f"install the Debian packages {', '.join(missing)}"] if missing else []
        if "containerd" in missing:
            install.append("(containerd's package starts a service of its own, which isn't used)")
        return [
            *install,
            "run Kubernetes as root on this machine, its node in namespaces of its own",
            "add a network interface, a route and a cgroup, which go with the cluster",
        ]

    def up(self) -> None:
        """Bring it up, or what of it is not running; returns when the node is ready."""
        if os.geteuid() != 0:
            raise Unavailable("the native cluster needs root")
        programs = binaries.ensure(binaries.NODE)
        install_system_packages()
        containerd_version()
        if self.healthy():
            versions.require_running(self.plane.minor_version)
            return
        try:
            self._start(programs)
        except BaseException:
            self.stop()
            raise

    def _start(self, programs: dict[str, Path]) -> None:
        plane = self.plane
        with step("Making the node's namespaces and network"):
            self.scheduler.stop()
            self.node.stop()
            self.node.enclose(programs, plane)
        plane.start(detached=True, programs=programs)
        command = components.scheduler(programs["kube-scheduler"], plane.layout)
        self.scheduler.start(command, detached=True)
        with step("Starting the Kubernetes node") as current:
            self.node.start_daemons()
            current.detail("containerd")
            wait_until(self._containerd_answers, what="containerd", seconds=READY_SECONDS)
            self._load_pause_image(programs["busybox"])
            current.detail("kubelet")
            wait_until(self._node_is_ready, what="the node", seconds=READY_SECONDS, interval=0.5)

    def stop(self) -> None:
        """End all processes, with interface, cgroup and mounts; `up` goes on with the data.

        The control plane goes first: its address goes with the node, and without it the API
        server waits in vain to say goodbye to itself.
        """
        self.scheduler.stop()
        self.plane.stop()
        self.node.stop()

    def down(self) -> None:
        """Remove it with everything in it."""
        if not self.folder.exists():
            return
        with step(f"Removing the native cluster {self.cluster}"):
            self.stop()
            shutil.rmtree(self.folder)

    def healthy(self) -> bool:
        """Whether all processes live and the node is ready."""
        alive = self.folder.exists() and self.node.alive() and self.scheduler.alive()
        return alive and self.plane.healthy() and self._node_is_ready()

    def _require_node(self) -> None:
        if self.node.init_process() is None:
            tail = self.node.process.tail()
            raise ClusterError(f"the node ended; logs are in {self.node.folder}/logs:\n{tail}")

    def _node_is_ready(self) -> bool:
        self._require_node()
        path = '{.status.conditions[?(@.type=="Ready")].status}'
        try:
            return self.kubectl("get", "node", NODE_NAME, f"--output=jsonpath={path}") == "True"
        except CommandFailed:
            return False

    def kubectl(self, *args: str, input: str | None = None) -> str:  # noqa: A002 - as subprocess
        """Run kubectl as the administrator and return what it printed."""
        command = [str(binaries.kubectl()), "--kubeconfig", str(self.kubeconfig), *args]
        return output(command, input=input)

    # Images

    def _ctr(self) -> list[str]:
        return ["ctr", "--address", self.node.containerd_address(), "--namespace", "k8s.io"]

    def _containerd_answers(self) -> bool:
        self._require_node()
        try:
            output([*self._ctr(), "version"])
        except (CommandFailed, ClusterError):
            return False
        return True

    def _load_pause_image(self, busybox: Path) -> None:
        archive = self.folder / "pause.tar"
        node_config.write_pause_image(archive, busybox, debian.architecture())
        self._import(archive, node_config.PAUSE_IMAGE)

    def _import(self, archive: Path, ref: str) -> None:
        log = self.folder / "node" / "logs" / "images.log"
        run([*self._ctr(), "images", "import", str(archive)], log=log)
        if ref not in output([*self._ctr(), "images", "list", "--quiet"]).split():
            raise ClusterError(f"{archive} holds no image named {ref}")

    def pull_without_tls(self, registry: str) -> None:
        """Have the node's containerd speak plain HTTP to the registry at this host and port."""
        folder = self.node.registries / registry
        folder.mkdir(exist_ok=True)
        url = json.dumps(f"http://{registry}")
        can = 'capabilities = ["pull", "resolve"]'
        (folder / "hosts.toml").write_text(f"server = {url}\n[host.{url}]\n{can}\n")

    def load_image(self, archive: Path, ref: str) -> None:
        """Import a docker-archive whose tag is `ref`; one that is already there is skipped."""
        stat = archive.stat()
        identity = f"{archive} {stat.st_size} {stat.st_mtime_ns}"
        loaded = self._loaded_images()
        if loaded.get(ref) == identity:
            return
        with step(f"Loading {ref} into the node"):
            self._import(archive, ref)
        self._images_file.write_text(json.dumps({**loaded, ref: identity}, indent=2))

    def _loaded_images(self) -> dict[str, str]:
        try:
            return dict(json.loads(self._images_file.read_text()))
        except OSError:
            return {}


# The Debian packages that the node and the image builds need


def system_packages_missing() -> list[str]:
    """Names of the packages to install, in a fixed order."""
    missing = [
        package
        for program, package in PACKAGES.items()
        if shutil.which(program, path=SEARCH_PATH) is None
    ]
    return list(dict.fromkeys(missing))


def install_system_packages() -> None:
    """Install what is missing, with apt and as root."""
    missing = system_packages_missing()
    if not missing:
        return
    if os.geteuid() != 0:
        raise Unavailable(f"run as root: apt-get install {' '.join(missing)}")
    log = cache_dir() / "apt-install.log"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    with step(f"Installing {', '.join(missing)}"):
        run(["apt-get", "update"], log=log, env=environment)
        run(install, log=log, env=environment)
