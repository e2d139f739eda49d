"""The first process of the native node, in namespaces of its own; run by file, not imported.

The node is one process tree in its own PID, mount and network namespaces, like the container of
a kind node. When this process ends, the kernel ends every process of the node and frees its
mounts, interfaces and packet filter rules: there is nothing to clean up by hand. It needs no
package besides Python itself, starts the daemons that its plan names, reaps orphans, and ends
the node when one of the daemons dies.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WAIT_SECONDS = 120
TUNABLES = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}
"""What the kubelet would set on the kernel; it finds them set in files that lie over the real."""


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def _wait_for(what: str, ready: Any) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not ready():
        if time.monotonic() > deadline:
            sys.exit(f"node: no {what} within {WAIT_SECONDS} s")
        time.sleep(0.05)


def _prepare_mounts(folder: Path, binds: dict[str, str]) -> None:
    """Give the node its own /run and data folders; all mounts are shared among its processes."""
    _mount("--make-rshared", "/")
    _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    for source, target in binds.items():
        _mount("--bind", source, target)
    for name, value in TUNABLES.items():
        real = Path("/proc/sys", name)
        if real.exists():
            cover = folder / "tunables" / name.replace("/", ".")
            cover.parent.mkdir(exist_ok=True)
            cover.write_text(f"{value}\n")
            _mount("--bind", str(cover), str(real))


def _start(daemon: dict[str, Any]) -> int:
    with Path(daemon["log"]).open("ab") as sink:
        process = subprocess.Popen(
            daemon["command"],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, "AWS_EC2_METADATA_DISABLED": "true"},  # else the kubelet asks it
        )
    if daemon.get("creates"):
        created = Path(daemon["creates"])
        _wait_for(str(created), lambda: created.exists() or process.poll() is not None)
    return process.pid


def _network_is_up() -> bool:
    return "eth0" in (name for _, name in socket.if_nameindex())


def main() -> None:
    """Set the node up, start its daemons, and reap until one of them dies."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(plan["folder"])
    _prepare_mounts(folder, plan["binds"])
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1\n")
    _wait_for("network interface", _network_is_up)
    _wait_for("start signal", Path(plan["start_file"]).exists)
    names = {_start(daemon): daemon["name"] for daemon in plan["daemons"]}
    while True:
        pid, status = os.wait()
        if pid in names:
            sys.exit(f"node: {names[pid]} ended with status {status}")


if __name__ == "__main__":
    main()
