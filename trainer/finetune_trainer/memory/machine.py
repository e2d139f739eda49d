"""What the machine at hand has, where no cluster tells."""

from __future__ import annotations

import os
from pathlib import Path

from finetune_trainer.contract import Hardware
from finetune_trainer.memory.gpus import describe_gpus, find_gpus
from finetune_trainer.runtime import binary


def this_machine(workspace: Path) -> Hardware:
    """GPUs, memory that is free now, and free disk below `workspace`."""
    gpus = find_gpus().usable
    disk = os.statvfs(_existing(workspace))
    free = disk.f_bavail * disk.f_frsize
    return Hardware(
        gpus=len(gpus),
        gpu_memory_bytes=min((gpu.memory_bytes for gpu in gpus), default=None),
        memory_bytes=free_memory(),
        ephemeral_storage_bytes=free,
        export_storage_bytes=free,
    )


def describe_machine(workspace: Path) -> list[str]:
    """Lines for people: what a training would find here."""
    disk = os.statvfs(_existing(workspace))
    return [
        *describe_gpus(find_gpus(wanted=1)),
        f"Memory: {binary(free_memory())} free",
        f"Disk: {binary(disk.f_bavail * disk.f_frsize)} free at {_existing(workspace)}",
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
