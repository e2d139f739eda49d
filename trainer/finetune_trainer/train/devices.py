"""The GPUs that a worker will see, asked for without loading torch into the stage."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

PROBE_SECONDS = 120.0  # a cold CUDA driver takes up to half a minute

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gpu:
    """One of them."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    """CUDA compute capability, e.g. (9, 0) for an H100."""


def visible_gpus(dev: Path = Path("/dev")) -> tuple[Gpu, ...]:
    """NVIDIA GPUs, as torch counts them (CUDA_VISIBLE_DEVICES, MIG and driver considered)."""
    if not any(dev.glob("nvidia[0-9]*")) and not (dev / "dxg").exists():  # dxg: WSL
        return ()
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=True
        )
        return parse(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError, TypeError) as error:
        log.warning("The GPUs can't be counted, training on one device: %s", error)
        return ()


def parse(output: str) -> tuple[Gpu, ...]:
    """The last line of the probe's output; raises ValueError or TypeError when it is none."""
    found = json.loads(output.strip().splitlines()[-1])
    return tuple(Gpu(g["name"], g["memory_bytes"], tuple(g["capability"])) for g in found)


def _probe() -> None:
    import torch  # noqa: PLC0415 - only in a process of its own

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [torch.cuda.get_device_properties(index) for index in range(count)]
    gpus = [Gpu(p.name, p.total_memory, (p.major, p.minor)) for p in found]
    print(json.dumps([asdict(gpu) for gpu in gpus]))  # noqa: T201 - the answer


if __name__ == "__main__":
    _probe()
