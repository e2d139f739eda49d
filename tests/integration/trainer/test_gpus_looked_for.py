"""What the driver and torch say of GPUs, read as they say it; both are told what to say here."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from finetune_trainer.memory.gpus import Driver, Gpu, TorchBuild
from finetune_trainer.memory.machine import _ask_driver, look_with_torch

GIB = 1 << 30
H100, L4 = Gpu("NVIDIA H100", 80 * GIB, (9, 0)), Gpu("NVIDIA L4", 24 * GIB, (8, 9))


def test_the_driver_tells_its_version_and_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [H100, L4]
    ended = list[bool]()
    said: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: ended.append(True),
        "nvmlSystemGetDriverVersion": lambda: "550.54.15",
        "nvmlSystemGetCudaDriverVersion_v2": lambda: 12040,
        "nvmlDeviceGetCount": lambda: len(gpus),
        "nvmlDeviceGetHandleByIndex": gpus.__getitem__,
        "nvmlDeviceGetName": lambda gpu: gpu.name,
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(total=gpu.memory_bytes),
        "nvmlDeviceGetCudaComputeCapability": lambda gpu: list(gpu.capability),
    }
    for name, function in said.items():
        assert hasattr(pynvml, name), "the library's own name"
        monkeypatch.setattr(pynvml, name, function)
    assert _ask_driver() == (Driver("550.54.15", (12, 4), (H100, L4)), None)
    assert ended == [True]


def test_what_keeps_the_driver_from_answering_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)

    monkeypatch.setattr(pynvml, "nvmlInit", lost)
    driver, error = _ask_driver()
    assert driver is None
    assert "version mismatch" in str(error)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert _ask_driver()[1] is not None


def test_torch_counts_the_gpus_on_which_a_kernel_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is full for the moment, which is no fault; on one no kernel runs."""
    about = [
        SimpleNamespace(name=gpu.name, total_memory=gpu.memory_bytes, major=major, minor=minor)
        for gpu, (major, minor) in ((H100, (9, 0)), (L4, (8, 9)), (H100, (9, 0)))
    ]

    def ones(_size: int, device: str) -> torch.Tensor:
        if device == "cuda:1":
            raise RuntimeError("CUDA error: no kernel image is available\nmore of it")
        if device == "cuda:2":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(8)

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(about))
    monkeypatch.setattr(torch.cuda, "get_device_properties", about.__getitem__)
    monkeypatch.setattr(torch, "ones", ones)
    found = look_with_torch()
    assert found.gpus == (H100, H100)
    assert found.error == "NVIDIA L4: CUDA error: no kernel image is available"

    def broken() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old\nUpdate it")

    monkeypatch.setattr(torch.cuda, "init", broken)
    unusable: TorchBuild = look_with_torch()
    assert unusable.gpus == ()
    assert unusable.error == "The NVIDIA driver on your system is too old"
