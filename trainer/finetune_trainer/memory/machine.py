"""What the machine at hand has: GPUs, memory, disk.

The driver is asked through NVML (nvidia-ml-py), torch in a process of its own, `python -m` this
module: importing it takes seconds, and the caller may have to do without it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune_trainer.contract import Hardware
from finetune_trainer.memory.gpus import (
    HIDING,
    NO_NVML,
    Driver,
    Gpu,
    Gpus,
    TorchBuild,
    describe_gpus,
)
from finetune_trainer.runtime import binary

PROBE_SECONDS = 120.0  # a cold CUDA driver takes up to half a minute


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


# --- GPUs --------------------------------------------------------------------------------------


def find_gpus(wanted: int = 0, dev: Path = Path("/dev")) -> Gpus:
    """Look at the devices, the driver and torch; the last only where there may be a GPU.

    With `wanted` GPUs torch is asked in any case, for the reason why there are fewer.
    """
    files = sorted([*dev.glob("nvidia[0-9]*"), *dev.glob("dxg"), *dev.glob("kfd")])
    driver, driver_error = _ask_driver()
    found = Gpus(
        tuple(file.name for file in files),
        driver,
        driver_error,
        hidden_by=os.environ.get(HIDING),
    )
    if not found.present and "kfd" not in found.device_files and not wanted:
        return found
    torch, torch_error = _ask_torch()
    return Gpus(**{**vars(found), "torch": torch, "torch_error": torch_error})


def _ask_driver() -> tuple[Driver | None, str | None]:
    try:
        import pynvml  # noqa: PLC0415 - an image of one's own may do without it
    except ImportError:
        return None, NO_NVML
    try:
        pynvml.nvmlInit()
        try:
            return _read_driver(pynvml), None
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return None, str(error)


def _read_driver(nvml: Any) -> Driver:
    def read(index: int) -> Gpu:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        return Gpu(
            str(nvml.nvmlDeviceGetName(handle)),
            int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
            tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
        )

    cuda = int(nvml.nvmlSystemGetCudaDriverVersion_v2())  # e.g. 12040 for 12.4
    return Driver(
        str(nvml.nvmlSystemGetDriverVersion()),
        (cuda // 1000, cuda % 1000 // 10),
        tuple(read(index) for index in range(nvml.nvmlDeviceGetCount())),
    )


def _ask_torch() -> tuple[TorchBuild | None, str | None]:
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"torch did not answer within {PROBE_SECONDS:.0f} seconds"
    try:
        return TorchBuild.parse(done.stdout.strip().splitlines()[-1]), None
    except (IndexError, ValueError, TypeError, KeyError):
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return None, f"torch can't be loaded: {last:.300}"


def look_with_torch() -> TorchBuild:
    """Count the GPUs with torch, and run a kernel on each."""
    import torch  # noqa: PLC0415 - only this process may wait for it

    version = torch.version
    flags = getattr(torch._C, "_cuda_getArchFlags", None)
    found, errors = [], []
    try:
        if torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
            torch.cuda.init()  # type: ignore[no-untyped-call] # it says what is wrong
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            if (error := _try_kernel(index)) is not None:
                errors.append(f"{about.name}: {error}")
                continue
            found.append(Gpu(about.name, about.total_memory, (about.major, about.minor)))
    except (RuntimeError, AssertionError) as error:
        errors.append(_first_line(error))
    return TorchBuild(
        version=str(torch.__version__),
        cuda=version.cuda,
        hip=version.hip,
        architectures=tuple((flags() or "").split()) if flags else (),
        gpus=tuple(found),
        error="; ".join(errors) or None,
    )


def _try_kernel(index: int) -> str | None:
    """What is wrong with a GPU; nothing where it is only full for the moment."""
    import torch  # noqa: PLC0415 - only this process may wait for it

    try:
        torch.ones(8, device=f"cuda:{index}").add_(1).sum().item()
    except torch.OutOfMemoryError:
        return None
    except RuntimeError as error:
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    print(json.dumps(asdict(look_with_torch())))  # noqa: T201 - the answer
