"""GPUs as `machine` finds them: what the driver has, what torch can use, and why that is less."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.runtime import binary

HIDING = "CUDA_VISIBLE_DEVICES"
NO_NVML = "nvidia-ml-py isn't installed"
# The oldest Linux driver for each major version of CUDA: NVIDIA's release notes of the toolkit, on
# "minor version compatibility".
OLDEST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}

Version = tuple[int, int]


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU."""

    name: str
    memory_bytes: int
    capability: Version
    """CUDA compute capability, e.g. (9, 0) for an H100."""


@dataclass(frozen=True)
class Driver:
    """What NVML says."""

    version: str
    cuda: Version
    """The newest CUDA that the driver can run."""

    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class TorchBuild:
    """What torch is built for, and what it finds."""

    version: str
    cuda: str | None = None
    """Version of CUDA; None in a build for CPUs or for AMD's GPUs."""

    hip: str | None = None
    """Version of ROCm, for AMD's GPUs."""

    architectures: tuple[str, ...] = ()
    """What it has kernels for: sm_90, or compute_90 for what the driver can compile further."""

    gpus: tuple[Gpu, ...] = ()
    """Those that it counts and on which a kernel ran."""

    error: str | None = None
    """What kept it from using a GPU, in its own words."""

    @classmethod
    def parse(cls, line: str) -> Self:
        """Read a line of JSON. Raises ValueError, TypeError or KeyError when it is none."""
        found = json.loads(line)
        gpus = [Gpu(g["name"], g["memory_bytes"], tuple(g["capability"])) for g in found["gpus"]]
        return cls(**{**found, "gpus": tuple(gpus), "architectures": tuple(found["architectures"])})

    def runs_on(self, capability: Version) -> bool:
        """Whether there are kernels for a compute capability."""
        major, minor = capability
        for name in self.architectures:
            kind, _, number = name.partition("_")
            digits = "".join(c for c in number if c.isdigit())
            built = (int(digits[:-1]), int(digits[-1]))
            if kind == "compute" and built <= capability:
                return True
            if kind == "sm" and built[0] == major and built[1] <= minor:
                return True
        return False

    @property
    def least_capability(self) -> str | None:
        """The oldest compute capability that it has kernels for, e.g. 7.5."""
        digits = ["".join(c for c in name if c.isdigit()) for name in self.architectures]
        least = min((int(each) for each in digits), default=None)
        return None if least is None else f"{least // 10}.{least % 10}"


@dataclass(frozen=True)
class Gpus:
    """Everything that is known about the GPUs here."""

    device_files: tuple[str, ...] = ()
    """Of NVIDIA (nvidia0 …, dxg in WSL) and of AMD (kfd), below /dev."""

    driver: Driver | None = None
    driver_error: str | None = None
    """NVML's own words, where it doesn't answer."""

    torch: TorchBuild | None = None
    """None where it wasn't asked, since nothing here is a GPU."""

    torch_error: str | None = None
    hidden_by: str | None = None
    """CUDA_VISIBLE_DEVICES, where it is set."""

    @property
    def usable(self) -> tuple[Gpu, ...]:
        """Those that torch can train on."""
        return self.torch.gpus if self.torch else ()

    @property
    def present(self) -> int:
        """How many there seem to be, whether or not torch can use them."""
        files = sum(1 for name in self.device_files if name != "kfd")
        return max(files, len(self.driver.gpus) if self.driver else 0, len(self.usable))


def check_gpus(wanted: int, found: Gpus) -> None:
    """Raise StageError(GpuUnavailable) when torch can use fewer GPUs than the pod was given."""
    if len(found.usable) >= wanted:
        return
    here = f"{len(found.usable)} of them" if found.usable else "none" if wanted > 1 else "it"
    can = "torch can use" if found.usable or wanted > 1 else "torch can't use"
    raise StageError(
        Reason.GPU_UNAVAILABLE,
        f"The training has {wanted} GPU{'s' if wanted > 1 else ''}, and {can} {here}: "
        f"{explain_missing(wanted, found)}",
    )


def explain_missing(wanted: int, found: Gpus) -> str:
    """Why torch can use fewer GPUs than `wanted`, and what to do about it."""
    return (
        _fault_of_image(found)
        or _fault_of_container(found)
        or _fault_of_driver(found)
        or _too_old(found)
        or _too_few(wanted, found)
        or _in_torchs_words(found)
    )


def _fault_of_image(found: Gpus) -> str | None:
    torch = found.torch
    if torch is None:
        return f"{found.torch_error or 'it was not asked'}. Use an intact trainer image."
    if torch.cuda or torch.hip:
        if "kfd" in found.device_files and not found.present and not torch.hip:
            return (
                f"the GPU is AMD's, and torch {torch.version} of this image is built for NVIDIA's. "
                "Use an image with a ROCm build of torch, or a node with NVIDIA's GPUs."
            )
        return None
    return (
        f"torch {torch.version} of this image is built for CPUs only. Use a trainer image with a "
        "CUDA build of torch."
    )


def _fault_of_container(found: Gpus) -> str | None:
    if found.driver or found.usable:
        return None
    if not found.device_files:
        return (
            "there is no /dev/nvidia* and no driver library in the container, so its runtime did "
            "not pass the GPU on. Set spec.stages.train.runtimeClassName to the node's class for "
            "NVIDIA GPUs (usually nvidia), or make that the node's default runtime."
        )
    if "not found" in (found.driver_error or "").lower():
        return (
            "the device is there, and the driver's library libnvidia-ml.so.1 isn't. Set "
            "spec.stages.train.runtimeClassName to the node's class for NVIDIA GPUs (usually "
            "nvidia), and let NVIDIA_DRIVER_CAPABILITIES contain compute and utility."
        )
    return None


def _fault_of_driver(found: Gpus) -> str | None:
    torch, driver = found.torch, found.driver
    if driver is None:
        if found.driver_error in (None, NO_NVML) or found.usable:
            return None
        return (
            f"the node's driver does not answer ({found.driver_error}). Load it, or restart the "
            "node if it was upgraded."
        )
    if torch is None or torch.cuda is None:
        return None
    needed = int(torch.cuda.partition(".")[0])
    if driver.cuda[0] >= needed:
        return None
    oldest = OLDEST_DRIVER.get(needed)
    return (
        f"driver {driver.version} runs CUDA up to {_dotted(driver.cuda)}, and torch "
        f"{torch.version} of this image is built for CUDA {torch.cuda}. Upgrade the node's driver"
        f"{f' to {oldest} or newer' if oldest else ''}, or use an image with a torch for CUDA "
        f"{driver.cuda[0]}."
    )


def _too_old(found: Gpus) -> str | None:
    """A GPU that this torch has no kernels for."""
    torch, driver = found.torch, found.driver
    if torch is None or driver is None or not torch.architectures:
        return None
    for gpu in driver.gpus:
        if not torch.runs_on(gpu.capability):
            return (
                f"{gpu.name} has compute capability {_dotted(gpu.capability)}, and torch "
                f"{torch.version} of this image has kernels for "
                f"{', '.join(torch.architectures)} only. Use a GPU of compute capability "
                f"{torch.least_capability} or newer, or an image with a torch for this one."
            )
    return None


def _too_few(wanted: int, found: Gpus) -> str | None:
    """Fewer than asked for, all of which work."""
    driver = found.driver
    if driver and found.hidden_by is not None and len(driver.gpus) > len(found.usable):
        return (
            f"{HIDING} is {found.hidden_by!r}, which hides some of the {len(driver.gpus)} that the "
            "driver has. Leave it out of spec.stages.train.env."
        )
    if found.usable and found.usable[0].name.find("MIG") >= 0:
        return "a process can use one MIG slice only. Ask for one, of a larger size."
    if found.usable and driver and len(driver.gpus) < wanted:
        return (
            f"the driver has {len(driver.gpus)} in this container. Look at the node's device "
            "plugin, or ask for as many."
        )
    return None


def _in_torchs_words(found: Gpus) -> str:
    error = found.torch.error if found.torch else None
    return (
        f"torch says: {error or 'no GPU is available'}. Look at the GPU with nvidia-smi on the "
        "node, and take the node out of service if it fails there as well."
    )


def first_visible(environment: Mapping[str, str]) -> str:
    """The value of CUDA_VISIBLE_DEVICES for a process that may use the first GPU alone."""
    return environment.get(HIDING, "0").split(",")[0]


def describe_gpus(found: Gpus) -> list[str]:
    """Lines for people: the GPUs, the driver, torch, and what is wrong with them."""
    lines = [
        f"GPU: {gpu.name}, {binary(gpu.memory_bytes)}, compute capability {_dotted(gpu.capability)}"
        for gpu in found.usable
    ] or ["GPU: none that torch can use"]
    if found.driver:
        lines.append(f"Driver: {found.driver.version}, CUDA up to {_dotted(found.driver.cuda)}")
    else:
        lines.append(f"Driver: none ({found.driver_error})")
    if found.torch:
        lines.append(f"torch: {found.torch.version}, {_built_for(found.torch)}")
    elif found.torch_error:
        lines.append(f"torch: {found.torch_error}")
    if found.torch and len(found.usable) < max(found.present, 1):
        what = "Not usable" if found.present else "A job with a GPU would fail here"
        lines.append(f"{what}: {explain_missing(max(found.present, 1), found)}")
    elif found.torch is None and found.torch_error:
        lines.append(f"Not usable: {explain_missing(1, found)}")
    return lines


def _built_for(torch: TorchBuild) -> str:
    if torch.hip:
        return f"built for ROCm {torch.hip}"
    if not torch.cuda:
        return "built for CPUs"
    major = int(torch.cuda.partition(".")[0])
    words = f"built for CUDA {torch.cuda}"
    if oldest := OLDEST_DRIVER.get(major):
        words += f" (driver {oldest} or newer)"
    if least := torch.least_capability:
        words += f" and GPUs of compute capability {least} or newer"
    return words


def _dotted(version: Version) -> str:
    return f"{version[0]}.{version[1]}"
