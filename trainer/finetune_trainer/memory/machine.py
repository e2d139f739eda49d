"""What the machine at hand has, for runs without a cluster that would tell."""

from __future__ import annotations

import os
from pathlib import Path

from finetune_trainer.contract import Hardware


def this_machine(workspace: Path) -> Hardware:
    """GPUs, memory that is free now, and free disk below `workspace`."""
    import torch  # noqa: PLC0415 - the rest of this package needs none

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(gpus)]
    disk = os.statvfs(_existing(workspace))
    return Hardware(
        gpus=gpus,
        gpu_memory_bytes=min(sizes, default=None),
        memory_bytes=free_memory(),
        ephemeral_storage_bytes=disk.f_bavail * disk.f_frsize,
    )


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
