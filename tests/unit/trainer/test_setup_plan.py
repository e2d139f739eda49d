"""The training's pod plans with its own GPUs where nobody could tell `prepare` what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract import Hardware, Reason, RunConfig, StageError, TrainingPlan
from finetune_trainer.memory.gpus import Gpu
from finetune_trainer.memory.plan import Lengths, plan
from finetune_trainer.train.supervisor.setup import MemoryNeeds, plan_for_gpus, read_needs
from tests.unit.trainer.test_memory_shape import MODELS, shape

GIB = 2**30
NEEDS = MemoryNeeds(shape("llama-3.1-8b"), longest=2048)
AS_WRITTEN = TrainingPlan(
    batch_size=2, gradient_accumulation_steps=4, gradient_checkpointing=True, device_bytes=1
)


def gpu(gib: float) -> Gpu:
    return Gpu("NVIDIA X", round(gib * GIB), (9, 0))


def config(hardware: dict[str, Any] | None, **training: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"source": "org/name"},
            "dataset": {"source": "/data.csv"},
            "output": {"uri": "/out"},
            "training": training,
            "hardware": hardware,
        }
    )


UNKNOWN: list[dict[str, Any] | None] = [None, {"gpus": 1}, {"gpus": 1, "memoryBytes": 64 * GIB}]


@pytest.mark.parametrize("hardware", UNKNOWN)
@pytest.mark.parametrize(
    ("gib", "expected"),
    [(80, (4, 2, False)), (22.5, (2, 4, True)), (20.5, (1, 8, True))],
)
def test_the_gpu_that_is_here_decides(
    hardware: dict[str, Any] | None, gib: float, expected: tuple[int, int, bool]
) -> None:
    found = plan_for_gpus(config(hardware), AS_WRITTEN, NEEDS, [gpu(gib)])
    split = (found.batch_size, found.gradient_accumulation_steps, found.gradient_checkpointing)
    assert split == expected
    assert found.memory_bytes == round(gib * GIB)
    # Just what `prepare` would have said, had it been told.
    told = Hardware(gpus=1, gpu_memory_bytes=round(gib * GIB))
    spec = config(hardware).training
    assert found == plan(spec, shape("llama-3.1-8b"), Lengths(2048), told)


def test_where_nothing_fits_it_ends_before_the_model_is_loaded() -> None:
    with pytest.raises(StageError) as raised:
        plan_for_gpus(config({"gpus": 1}), AS_WRITTEN, NEEDS, [gpu(12)])
    assert raised.value.reason is Reason.OUT_OF_GPU_MEMORY
    assert "the GPU has 12.0 GiB" in raised.value.message
    assert "method: qlora" in raised.value.message


def test_the_smallest_of_several_gpus_counts_and_all_that_can_share_a_step_do() -> None:
    found = plan_for_gpus(config({"gpus": 3}), AS_WRITTEN, NEEDS, [gpu(80), gpu(22.5), gpu(80)])
    split = (found.batch_size, found.gradient_accumulation_steps, found.parallelism)
    assert split == (2, 2, "ddp"), "two of the three share eight examples"
    assert found.memory_bytes == round(22.5 * GIB)
    small = [gpu(16), gpu(16)]
    assert plan_for_gpus(config({"gpus": 2}), AS_WRITTEN, NEEDS, small).parallelism == "fsdp"


def test_a_plan_that_prepare_made_for_a_known_gpu_is_kept() -> None:
    told = {"gpus": 1, "gpuMemoryBytes": 24 * GIB}
    prepared = plan(
        config(told).training, shape("llama-3.1-8b"), Lengths(2048), Hardware.model_validate(told)
    )
    # The operator looks at the nodes for `prepare` only, so `train` isn't told their memory again.
    assert plan_for_gpus(config({"gpus": 1}), prepared, NEEDS, [gpu(80)]) is prepared


def test_a_plan_for_a_processor_is_none_for_a_gpu_that_turns_up() -> None:
    prepared = plan(
        config(None).training,
        shape("llama-3.1-8b"),
        Lengths(2048),
        Hardware(memory_bytes=256 * GIB),
    )
    found = plan_for_gpus(config({"memoryBytes": 256 * GIB}), prepared, NEEDS, [gpu(80)])
    assert found.memory_bytes == 80 * GIB


@pytest.mark.parametrize("hardware", [None, {}, {"memoryBytes": 8 * GIB}, {"gpus": 1}])
def test_without_a_gpu_the_plan_stays_as_it_was(hardware: dict[str, Any] | None) -> None:
    assert plan_for_gpus(config(hardware), AS_WRITTEN, NEEDS, []) is AS_WRITTEN


def test_of_a_model_whose_widths_are_unknown_nothing_is_predicted() -> None:
    unknown = MemoryNeeds(None, longest=2048)
    assert plan_for_gpus(config({"gpus": 1}), AS_WRITTEN, unknown, [gpu(1)]) is AS_WRITTEN


def test_the_needs_are_read_from_the_model_and_from_what_prepare_left(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((MODELS / "llama-3.1-8b.json").read_bytes())
    summary = {"tokens": {"count": 3, "total": 900, "max": 2048}}
    assert read_needs(tmp_path, json.dumps(summary).encode()) == NEEDS
