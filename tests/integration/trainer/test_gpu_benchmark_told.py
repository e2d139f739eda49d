"""The lines of `make gpu` that ask CUDA, where there is none: torch is told what to say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import ladder, speed, trainings
from benchmarks.gpu.models import Scale
from benchmarks.gpu.outcome import Outcome
from benchmarks.gpu.trainings import Ask, Bench
from finetune_trainer.contract import TrainingMetrics
from finetune_trainer.model.shape import Shape

GIB = 1 << 30
FREE, TOTAL, RESERVED = 70 * GIB, 80 * GIB, 7 * GIB


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    said: dict[str, Any] = {
        "is_available": lambda: True,
        "mem_get_info": lambda: (FREE, TOTAL),
        "memory_reserved": lambda: RESERVED,
        "empty_cache": lambda: None,
        "get_device_name": lambda: "NVIDIA H100 80GB HBM3",
        "get_device_properties": lambda _: SimpleNamespace(total_memory=TOTAL),
    }
    for name, function in said.items():
        assert hasattr(torch.cuda, name), "the library's own name"
        monkeypatch.setattr(torch.cuda, name, function)


def test_the_peak_has_what_the_driver_holds_beside_the_allocator() -> None:
    metrics = TrainingMetrics(
        predicted_memory_bytes=9 * GIB, peak_memory_bytes=RESERVED, peak_allocated_bytes=6 * GIB
    )
    assert speed.memory_figures(metrics) == {
        "predicted_bytes": 9 * GIB,
        "peak_bytes": 10 * GIB,
        "allocated_bytes": 6 * GIB,
        "driver_bytes": 3 * GIB,
    }


def test_a_gpu_is_filled_but_for_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[tuple[int, Any]]()

    def empty(size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        assert dtype.itemsize == 1
        made.append((size, device))

    monkeypatch.setattr(torch, "empty", empty)
    device = torch.device("cuda")
    trainer: Any = SimpleNamespace(args=SimpleNamespace(device=device))
    ladder.FullDevice(FREE - 3).fill(trainer)
    ladder.FullDevice(FREE + 3).fill(trainer)
    assert made == [(3, device), (0, device)]


def test_a_figure_of_a_known_gpu_is_held_against_what_was_predicted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    bench = Bench(tmp_path, Scale.full())
    assert bench.device == "cuda"
    hardware = trainings.hardware_of(bench)
    assert (hardware.gpus, hardware.gpu_memory_bytes) == (1, TOTAL)

    shape = Shape("llama", 2, 4, 4, 2, 8, 16, tied=True)
    monkeypatch.setattr(Bench, "shape", lambda *_: shape)
    clock = trainings.StepClock(1.0, times=[0.0, 1.0, 2.0, 4.0])
    found: Outcome = speed._timed(
        bench, Ask("1b", (64,) * 8), clock, 500, {"predicted_tokens_per_second": 500.0}
    )
    assert found.words == "250 tokens/s, 0.50 of what was predicted"
    assert found.figures["mfu"] > 0
