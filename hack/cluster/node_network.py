"""The wire between the machine and the native node: one veth pair and one route.

The machine's end carries the address on which the API server and the object store listen, the
node's end the address of the node. Pods live on a bridge inside the node. Neither end is
reachable from outside the machine. When the node's network namespace goes, so does the pair.
"""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass

from hack.cluster.components import SERVICE_RANGE
from hack.process import ClusterError, CommandFailed, Unavailable, output

FIRST_BYTES = range(201, 240)


@dataclass(frozen=True)
class NodeNetwork:
    """Addresses within 10.<number>.0.0/16, and the name of the machine's end of the wire."""

    number: int
    link: str

    @property
    def host_address(self) -> str:
        """The machine as the pods see it."""
        return f"10.{self.number}.0.1"

    @property
    def node_address(self) -> str:
        """The node as the machine sees it."""
        return f"10.{self.number}.0.2"

    @property
    def pod_range(self) -> str:
        """The addresses of the pods."""
        return f"10.{self.number}.1.0/24"

    def connect(self, node_pid: int) -> None:
        """Lay the wire into the network namespace of a process, and address both ends."""
        self.disconnect()
        node = ["nsenter", "--net", "--target", str(node_pid), "ip"]
        peer = ["peer", "name", "eth0", "netns", str(node_pid)]
        output(["ip", "link", "add", self.link, "type", "veth", *peer])
        output(["ip", "address", "add", f"{self.host_address}/30", "dev", self.link])
        output(["ip", "link", "set", self.link, "up"])
        output([*node, "link", "set", "lo", "up"])
        output([*node, "address", "add", f"{self.node_address}/30", "dev", "eth0"])
        output([*node, "link", "set", "eth0", "up"])
        output([*node, "route", "add", SERVICE_RANGE, "via", self.host_address])
        output(["ip", "route", "replace", self.pod_range, "via", self.node_address])

    def disconnect(self) -> None:
        """Take the wire away, with the route over it."""
        if not self.present():
            return
        try:
            output(["ip", "link", "delete", self.link])
        except CommandFailed:
            # The kernel takes it away itself, a moment after the node's namespace has ended.
            if self.present():
                raise

    def present(self) -> bool:
        """Whether the machine's end is there."""
        try:
            output(["ip", "link", "show", self.link])
        except CommandFailed:
            return False
        return True


def choose(link: str) -> NodeNetwork:
    """A network that no route of this machine overlaps."""
    routes = json.loads(output(["ip", "-j", "-4", "route", "show"]) or "[]")
    taken = [_network(route["dst"]) for route in routes if route.get("dst") != "default"]
    for number in FIRST_BYTES:
        candidate = ipaddress.ip_network(f"10.{number}.0.0/16")
        if not any(candidate.overlaps(other) for other in taken):
            return NodeNetwork(number, link)
    raise Unavailable("no free network of the form 10.x.0.0/16 with x from 201 on")


def _network(destination: str) -> ipaddress.IPv4Network:
    try:
        return ipaddress.IPv4Network(destination, strict=False)
    except ValueError as error:
        raise ClusterError(f"can't read the route to {destination}") from error
