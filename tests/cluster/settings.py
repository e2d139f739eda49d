"""What stays the same when the same cluster is started again: its ports and its users' tokens."""

from __future__ import annotations

import json
import secrets
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

LOOPBACK = "127.0.0.1"
NODE_NAME = "finetune-node"
USERS = {
    "admin": ("admin", "system:masters"),
    "scheduler": ("system:kube-scheduler", ""),
    "proxy": ("system:kube-proxy", ""),
    "kubelet": (f"system:node:{NODE_NAME}", "system:nodes"),
}
"""The users with a bearer token: user name and group by the name of their kubeconfig."""


def free_ports(address: str, count: int) -> list[int]:
    """Ports that nobody listens on at this moment."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((address, 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def is_free(address: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


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
