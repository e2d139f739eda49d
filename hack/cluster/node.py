"""One native node: its namespaces, its daemons, and what it leaves outside of them.

Outside are only the cgroup of its pods, the machine's end of the wire, and empty folders on which
data folders are mounted inside; `stop` takes all of these away.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from hack.cluster import node_config, node_init, node_network
from hack.cluster.components import NODE_NAME, command, minor_version
from hack.cluster.control_plane import ControlPlane
from hack.cluster.node_network import NodeNetwork
from hack.process import ClusterError, CommandFailed, Daemon, Unavailable, output, wait_until

CGROUPS = Path("/sys/fs/cgroup")
BINDS = {
    "kubelet": Path("/var/lib/kubelet"),
    "cni-state": Path("/var/lib/cni"),
    "pod-logs": Path("/var/log/pods"),
    "container-logs": Path("/var/log/containers"),
}
"""Folders with fixed places in kubelet and CNI, by the name of the data folder that covers them."""


@dataclass
class NodeRecord:
    """What must be known to find and remove the node later."""

    network: NodeNetwork
    created: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> NodeRecord:
        """Read the record of an earlier start."""
        values = json.loads(path.read_text())
        return cls(NodeNetwork(**values["network"]), values["created"])


class Node:
    """containerd, kubelet and kube-proxy in namespaces of their own."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.process = Daemon("node", folder)
        self._record_file = folder / "node.json"
        # another checkout may run a cluster of the same name on this machine
        self._identity = hashlib.sha256(str(folder).encode()).hexdigest()[:8]

    @property
    def registries(self) -> Path:
        """A folder for each container registry that containerd is told something about."""
        return self.folder / "registries"

    @property
    def record(self) -> NodeRecord:
        """The node's network and traces, chosen at its first start."""
        if not self._record_file.exists():
            self._save(NodeRecord(node_network.choose(f"ft-{self._identity}")))
        return NodeRecord.load(self._record_file)

    @property
    def network(self) -> NodeNetwork:
        """The addresses of the machine, the node and the pods."""
        return self.record.network

    @property
    def cgroup(self) -> str:
        """The name of the cgroup of the node's pods."""
        return f"finetune-{self.name}-{self._identity}"

    def _save(self, record: NodeRecord) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._record_file.write_text(json.dumps(asdict(record), indent=2))

    def init_process(self) -> psutil.Process | None:
        """The first process inside; the recorded one is only its parent outside."""
        parent = self.process.process()
        children = parent.children() if parent else []
        return children[0] if children else None

    def alive(self) -> bool:
        """Whether the node runs and its wire is there."""
        return self.init_process() is not None and self.network.present()

    def containerd_address(self) -> str:
        """containerd's socket as seen from outside: a short path, whatever the folder's name."""
        process = self.init_process()
        if process is None:
            raise ClusterError(f"the node {self.name} isn't running")
        return f"/proc/{process.pid}/root{node_config.CONTAINERD_SOCKET}"

    def enclose(self, programs: dict[str, Path], plane: ControlPlane) -> None:
        """Make the namespaces and the wire, so that the API server has its address."""
        record = self.record
        for target in BINDS.values():
            if not target.exists():
                target.mkdir(parents=True)
                record.created.append(str(target))
        self._save(record)
        create_cgroup(self.cgroup)
        self._reset()
        self._write_plan(programs, plane)
        namespaces = ["--mount", "--pid", "--net", "--fork", "--kill-child", "--mount-proc"]
        namespaces += ["--propagation", "slave"]  # an unmount outside must not be held up inside
        script = str(Path(node_init.__file__).resolve())
        init = [sys.executable, script, str(self._plan_file)]
        self.process.start(["unshare", *namespaces, *init], detached=True)
        wait_until(self._init_runs, what="the node's first process", seconds=20)
        process = self.init_process()
        if process is None:
            raise ClusterError(f"the node ended at once:\n{self.process.tail()}")
        record.network.connect(process.pid)

    def _init_runs(self) -> bool:
        process = self.init_process()
        if process is None:
            return not self.process.alive()
        with contextlib.suppress(psutil.Error):
            return "node_init" in " ".join(process.cmdline())
        return False

    @property
    def _plan_file(self) -> Path:
        return self.folder / "node-plan.json"

    @property
    def _start_file(self) -> Path:
        return self.folder / "node-may-start"

    def _reset(self) -> None:
        """Forget what only holds for one life of the node, as a reboot would."""
        self._start_file.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "cni-state", ignore_errors=True)
        for name in (*BINDS, "containerd", "cni", self.registries.name):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def _write_plan(self, programs: dict[str, Path], plane: ControlPlane) -> None:
        """Write the daemons' configuration, and what the first process is to do."""
        root = self.folder
        snapshotter = "native" if _filesystem(root) == "overlayfs" else "overlayfs"
        runtime = node_config.Containerd(
            root / "containerd", root / "cni", self.registries, snapshotter
        )
        network = self.network
        minor = minor_version(programs["kubelet"])
        files: dict[str, str] = {
            "containerd.toml": runtime.config(containerd_version()),
            "cni/10-finetune.conflist": json.dumps(node_config.cni(network)),
            "kubelet.json": json.dumps(
                node_config.kubelet(network, plane.ca, f"/{self.cgroup}", minor)
            ),
            "kube-proxy.json": json.dumps(
                node_config.kube_proxy(network, plane.user_kubeconfig("proxy"))
            ),
        }
        for name, content in files.items():
            (root / name).write_text(content)
        plan = {
            "folder": str(root),
            "binds": {str(root / name): str(target) for name, target in BINDS.items()},
            "start_file": str(self._start_file),
            "daemons": self._daemons(programs, plane, minor),
        }
        self._plan_file.write_text(json.dumps(plan, indent=2))

    def _daemons(
        self, programs: dict[str, Path], plane: ControlPlane, minor: int
    ) -> list[dict[str, object]]:
        kubelet = {
            "config": self.folder / "kubelet.json",
            "kubeconfig": plane.user_kubeconfig("kubelet"),
            "hostname-override": NODE_NAME,
            "node-ip": self.network.node_address,
            "container-runtime-endpoint": f"unix://{node_config.CONTAINERD_SOCKET}",
        }
        if minor < 24:
            kubelet["container-runtime"] = "remote"
        containerd = {"config": self.folder / "containerd.toml"}
        proxy = {"config": self.folder / "kube-proxy.json"}
        commands = {
            "containerd": command(Path("containerd"), containerd),
            "kubelet": command(programs["kubelet"], kubelet),
            "kube-proxy": command(programs["kube-proxy"], proxy),
        }
        creates = {"containerd": node_config.CONTAINERD_SOCKET}
        return [
            {
                "name": name,
                "command": words,
                "log": str(self.folder / "logs" / f"{name}.log"),
                "creates": creates.get(name),
            }
            for name, words in commands.items()
        ]

    def start_daemons(self) -> None:
        """Let the first process go on, now that there is an API server to talk to."""
        self._start_file.touch()

    def stop(self) -> None:
        """End every process of the node, and take its traces outside away."""
        process = self.init_process()
        if process is not None:
            process.send_signal(signal.SIGKILL)
        self.process.stop(first=signal.SIGKILL)
        if process is not None:
            wait_until(lambda: not process.is_running(), what="the node's end", seconds=30)
        if not self._record_file.exists():
            return
        record = self.record
        record.network.disconnect()
        remove_cgroup(self.cgroup)
        for target in record.created:
            with contextlib.suppress(OSError):
                Path(target).rmdir()
        record.created.clear()
        self._save(record)


def containerd_version() -> int:
    """The major version of the machine's containerd: 2 reads another configuration than 1.

    Raises Unavailable where it doesn't run.
    """
    try:
        found = re.search(r"\bv?(\d+)\.\d+\.\d+", output(["containerd", "--version"]))
    except (CommandFailed, OSError) as error:
        raise Unavailable(f"containerd doesn't run: {error}") from error
    if not found:
        raise Unavailable("containerd doesn't tell its version")
    return int(found[1])


def _filesystem(path: Path) -> str:
    return output(["stat", "--file-system", "--format", "%T", os.fspath(path)]).strip()


# The cgroup below which a cluster's pods live, in both of the kernel's cgroup versions


def _cgroup_trees() -> list[Path]:
    """The one tree of version 2, or the tree of each controller of version 1."""
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]
    found = {path.resolve() for path in CGROUPS.iterdir() if (path / "cgroup.procs").exists()}
    return sorted(found)


def create_cgroup(name: str) -> None:
    """Make the cgroup; in version 2 its children get every controller that there is."""
    for root in _cgroup_trees():
        folder = root / name
        folder.mkdir(exist_ok=True)
        if (root / "cgroup.controllers").exists():
            for parent in (root, folder):
                _enable_controllers(parent)


def _enable_controllers(folder: Path) -> None:
    for controller in (folder / "cgroup.controllers").read_text().split():
        with contextlib.suppress(OSError):
            (folder / "cgroup.subtree_control").write_text(f"+{controller}")


def remove_cgroup(name: str) -> None:
    """Remove the cgroup with all below it; its processes must have ended."""
    wait_until(
        lambda: _cgroup_is_gone(name), what=f"end of the processes of cgroup {name}", seconds=20
    )


def _cgroup_is_gone(name: str) -> bool:
    for root in _cgroup_trees():
        top = root / name
        children = [path for path in top.rglob("*") if path.is_dir()] if top.exists() else []
        for folder in [*sorted(children, key=lambda path: -len(path.parts)), top]:
            with contextlib.suppress(OSError):
                folder.rmdir()
    return not any((root / name).exists() for root in _cgroup_trees())
