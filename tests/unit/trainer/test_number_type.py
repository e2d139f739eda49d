"""In what a GPU computes, and what that means for its memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from finetune_trainer.contract import Hardware, Reason, StageError
from finetune_trainer.memory.gpus import Gpu
from finetune_trainer.memory.plan import Lengths, plan
from finetune_trainer.model.shape import number_type
from finetune_trainer.train.supervisor.setup import MemoryNeeds, plan_for_gpus
from tests.unit.trainer.test_memory_shape import shape
from tests.unit.trainer.test_setup_plan import AS_WRITTEN, config

GIB = 2**30
T4 = Gpu("Tesla T4", 16 * GIB, (7, 5))
P40 = Gpu("Tesla P40", 24 * GIB, (6, 1))


@pytest.mark.parametrize(
    ("capability", "model_type", "expected"),
    [
        ((9, 0), "llama", "bfloat16"),
        ((8, 0), "gemma2", "bfloat16"),
        ((7, 5), "llama", "float16"),
        ((7, 0), "qwen3", "float16"),
        ((7, 5), "gemma", "float16"),
        ((7, 5), "gemma2", "float32"),
        ((7, 5), "gemma3_text", "float32"),
        ((7, 5), None, "float16"),
        ((6, 1), "llama", "float32"),
    ],
)
def test_sixteen_bits_where_the_hardware_has_them_and_the_model_stands_them(
    capability: tuple[int, int], model_type: str | None, expected: str
) -> None:
    assert number_type(capability, model_type) == expected


def test_a_t4_takes_two_bytes_a_weight_and_a_model_that_overflows_four() -> None:
    spec = config(None).training
    on_t4 = plan_for_gpus(config(None), AS_WRITTEN, MemoryNeeds(shape("llama-3.2-1b"), 512), [T4])
    told = Hardware(gpus=1, gpu_memory_bytes=16 * GIB)
    assert on_t4 == plan(spec, shape("llama-3.2-1b"), Lengths(512), told)

    needs = MemoryNeeds(shape("gemma-3-1b"), 512)
    overflowing = plan_for_gpus(config(None), AS_WRITTEN, needs, [T4])
    newer = plan_for_gpus(config(None), AS_WRITTEN, needs, [replace(T4, capability=(8, 0))])
    assert overflowing.gradient_checkpointing
    assert not newer.gradient_checkpointing


def test_what_prepare_planned_for_sixteen_bits_is_planned_anew_for_an_older_gpu() -> None:
    """It fits in bfloat16, and would run out of memory here."""
    known = config({"gpus": 1, "gpuMemoryBytes": 24 * GIB})
    needs = MemoryNeeds(shape("llama-3.1-8b"), 2048)
    prepared = plan(
        known.training, shape("llama-3.1-8b"), Lengths(2048), known.hardware or Hardware()
    )
    assert plan_for_gpus(known, prepared, needs, [replace(P40, capability=(8, 6))]) is prepared
    with pytest.raises(StageError, match="method: qlora") as caught:
        plan_for_gpus(known, prepared, needs, [P40])
    assert caught.value.reason is Reason.OUT_OF_GPU_MEMORY
