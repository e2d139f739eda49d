"""The command lines of a control plane's programs, from the oldest supported Kubernetes on.

What only 1.20 needs, the last resort of a machine that can get nothing newer, is marked so.

Ports and tokens stay the same when the same cluster is started again.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from hack.cluster.versions import version_of
from hack.process import free_ports, is_free

LOOPBACK = "127.0.0.1"
NODE_NAME = "finetune-node"
USERS = {
    "admin": ("admin", "system:masters"),
    "scheduler": ("system:kube-scheduler", ""),
    "proxy": ("system:kube-proxy", ""),
    "kubelet": (f"system:node:{NODE_NAME}", "system:nodes"),
}
"""The users with a bearer token: user name and group by the name of their kubeconfig."""
SERVICE_RANGE = "10.96.0.0/16"
SERVICE_ADDRESS = "10.96.0.1"
CONTROLLERS = (
    "job,cronjob,garbagecollector,namespace,serviceaccount,serviceaccount-token,"
    "root-ca-cert-publisher,endpoint,endpointslice,deployment,replicaset,disruption,"
    "nodelifecycle,podgc,resourcequota,ttl-after-finished,clusterrole-aggregation,"
    "persistentvolume-binder,pvc-protection,ephemeral-volume"
)
EVICTION = "taint-eviction-controller"
"""Takes the pods off a tainted node. Before 1.29 it was part of nodelifecycle."""
CLAIMS = "resourceclaim-controller"
"""Makes the ResourceClaims of pods. Before 1.34 there are none by default."""


@dataclass
class Settings:
    """Ports and tokens of one cluster."""

    port: int
    etcd_port: int
    etcd_peer_port: int
    manager_port: int
    scheduler_port: int
    tokens: dict[str, str]

    @classmethod
    def new(cls, address: str, tokens: dict[str, str] | None = None) -> Self:
        """Free ports, and new tokens unless there are earlier ones to keep."""
        tokens = tokens or {user: secrets.token_hex(16) for user in USERS}
        etcd, peer, manager, scheduler = free_ports(LOOPBACK, 4)
        return cls(free_ports(address, 1)[0], etcd, peer, manager, scheduler, tokens)

    @classmethod
    def load(cls, path: Path) -> Self:
        """The settings that an earlier start saved."""
        return cls(**json.loads(path.read_text()))

    def save(self, path: Path) -> None:
        """Save them; they hold secrets, so for the owner's eyes only."""
        path.touch(mode=0o600)
        path.write_text(json.dumps(asdict(self), indent=2))

    def usable(self, address: str) -> bool:
        """Whether all ports are still free."""
        local = (self.etcd_port, self.etcd_peer_port, self.manager_port, self.scheduler_port)
        return is_free(address, self.port) and all(is_free(LOOPBACK, port) for port in local)

    def token_file(self) -> str:
        """The users in the form of the API server's --token-auth-file."""
        rows = []
        for user, (name, group) in USERS.items():
            rows.append(",".join([self.tokens[user], name, user, *([group] if group else [])]))
        return "\n".join(rows) + "\n"


@dataclass(frozen=True)
class Layout:
    """Where one control plane keeps its files, and where it listens."""

    folder: Path
    address: str
    settings: Settings

    @property
    def pki(self) -> Path:
        """The folder of certificates and keys."""
        return self.folder / "pki"

    def kubeconfig(self, user: str) -> Path:
        """The kubeconfig of one user."""
        return self.folder / f"{user}.kubeconfig"


def command(program: Path, values: Mapping[str, object]) -> list[str]:
    """A command line of a program and its flags, with booleans in Go's spelling."""
    spelled = {k: str(v).lower() if isinstance(v, bool) else v for k, v in values.items()}
    return [str(program), *(f"--{name}={value}" for name, value in spelled.items())]


def minor_version(program: Path) -> int:
    """The 37 of a program that calls itself v1.37.2."""
    return int(version_of(program).split(".")[1])


def _insecure_port_off(minor: int) -> dict[str, object]:
    """For 1.20: managers and schedulers also open a plain HTTP port unless they are told not to."""
    return {"port": 0} if minor < 23 else {}


def _gates(minor: int) -> dict[str, object]:
    """For 1.20: what every later one does by default, and this one only on demand."""
    return {"feature-gates": "TTLAfterFinished=true"} if minor < 21 else {}


def etcd(program: Path, layout: Layout) -> list[str]:
    """etcd without fsync: this data need not survive a power cut."""
    client = f"http://{LOOPBACK}:{layout.settings.etcd_port}"
    peer = f"http://{LOOPBACK}:{layout.settings.etcd_peer_port}"
    values = {
        "name": "default",
        "data-dir": layout.folder / "etcd",
        "listen-client-urls": client,
        "advertise-client-urls": client,
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "initial-cluster": f"default={peer}",
        "unsafe-no-fsync": True,
    }
    return command(program, values)


def apiserver(program: Path, layout: Layout) -> list[str]:
    """The API server, with RBAC on. On loopback it can't be the endpoint of a Service."""
    pki = layout.pki
    reconciler = "none" if layout.address == LOOPBACK else "lease"
    values = {
        "etcd-servers": f"http://{LOOPBACK}:{layout.settings.etcd_port}",
        "bind-address": layout.address,
        "advertise-address": layout.address,
        "secure-port": layout.settings.port,
        "endpoint-reconciler-type": reconciler,
        "tls-cert-file": pki / "apiserver.crt",
        "tls-private-key-file": pki / "apiserver.key",
        "client-ca-file": pki / "ca.crt",
        "kubelet-client-certificate": pki / "apiserver-kubelet-client.crt",
        "kubelet-client-key": pki / "apiserver-kubelet-client.key",
        "kubelet-preferred-address-types": "InternalIP",
        "service-cluster-ip-range": SERVICE_RANGE,
        "service-account-key-file": pki / "service-account.key",
        "service-account-signing-key-file": pki / "service-account.key",
        "service-account-issuer": "https://kubernetes.default.svc",
        "authorization-mode": "Node,RBAC",
        "token-auth-file": pki / "tokens.csv",
        "allow-privileged": True,
        "profiling": False,
        **_gates(minor_version(program)),
    }
    return command(program, values)


def controller_manager(program: Path, layout: Layout) -> list[str]:
    """The controllers that the operator relies on, and those that keep a node usable."""
    minor = minor_version(program)
    values = {
        "kubeconfig": layout.kubeconfig("admin"),
        "bind-address": LOOPBACK,
        "secure-port": layout.settings.manager_port,
        "service-account-private-key-file": layout.pki / "service-account.key",
        "root-ca-file": layout.pki / "ca.crt",
        "leader-elect": False,
        "controllers": ",".join(
            [CONTROLLERS, *([EVICTION] if minor >= 29 else []), *([CLAIMS] if minor >= 34 else [])]
        ),
        **_insecure_port_off(minor),
        **_gates(minor),
    }
    return command(program, values)


def scheduler(program: Path, layout: Layout) -> list[str]:
    """The scheduler, only needed where there is a node."""
    values = {
        "kubeconfig": layout.kubeconfig("scheduler"),
        "bind-address": LOOPBACK,
        "secure-port": layout.settings.scheduler_port,
        "leader-elect": False,
        **_insecure_port_off(minor_version(program)),
    }
    return command(program, values)
