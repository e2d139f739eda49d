"""What the machine at hand has, where no cluster tells.

As a program it prints the GPUs that torch sees, as a line of JSON, for a process without torch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from finetune_trainer.contract import Hardware


def this_machine(workspace: Path) -> Hardware:
    """GPUs, memory that is free now, and free disk below `workspace`."""
    gpus = find_gpus()
    disk = os.statvfs(_existing(workspace))
    return Hardware(
        gpus=len(gpus),
        gpu_memory_bytes=min((gpu["memory_bytes"] for gpu in gpus), default=None),
        memory_bytes=free_memory(),
        ephemeral_storage_bytes=disk.f_bavail * disk.f_frsize,
    )


def find_gpus() -> list[dict[str, Any]]:
    """Name, memory and compute capability of each GPU that torch sees."""
    import torch  # noqa: PLC0415 - the rest of this package needs none

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [torch.cuda.get_device_properties(index) for index in range(count)]
    return [
        {"name": p.name, "memory_bytes": p.total_memory, "capability": (p.major, p.minor)}
        for p in found
    ]


def free_memory() -> int:
    """Bytes that a new process can have: what the kernel calls available, within the cgroup."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit = next(iter(_lines("/sys/fs/cgroup/memory.max")), "max")
    return min(available, int(limit)) if limit.isdecimal() else available


def _lines(file: str) -> list[str]:
    try:
        return Path(file).read_text().splitlines()
    except OSError:
        return []


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.parent)


if __name__ == "__main__":
    print(json.dumps(find_gpus()))  # noqa: T201 - the answer
