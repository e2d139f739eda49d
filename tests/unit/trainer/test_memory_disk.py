"""Sizes on disk, against files that were really written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract import (
    EarlyStopping,
    Export,
    Model,
    Quantization,
    Reason,
    StageError,
    Training,
)
from finetune_trainer.memory.forecast import (
    DiskNeed,
    check_disk,
    downloaded,
    export_disk,
    gguf_bytes,
    training_disk,
)
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.base_model import BaseModelFiles
from finetune_trainer.prepare.prepare_stage import model_on_disk
from tests import report_facts
from tests.unit.trainer.test_memory_shape import shape

GIB, MB = 2**30, 10**6
Q = Quantization

FILES = {
    # llama.cpp's README of its quantizer (Llama-3.1-8B, GiB).
    ("llama-3.1-8b", Q.F16): 14.96 * GIB,
    ("llama-3.1-8b", Q.Q8_0): 7.95 * GIB,
    ("llama-3.1-8b", Q.Q6_K): 6.14 * GIB,
    ("llama-3.1-8b", Q.Q5_K_M): 5.33 * GIB,
    ("llama-3.1-8b", Q.Q4_K_M): 4.58 * GIB,
    ("llama-3.1-8b", Q.IQ4_XS): 4.17 * GIB,
    ("llama-3.1-8b", Q.Q3_K_M): 3.74 * GIB,
    # Its README of perplexity (Llama 3 8B, of the same widths).
    ("llama-3.1-8b", Q.IQ3_M): 3.53 * GIB,
    ("llama-3.1-8b", Q.IQ3_S): 3.42 * GIB,
    ("llama-3.1-8b", Q.IQ3_XS): 3.28 * GIB,
    ("llama-3.1-8b", Q.IQ3_XXS): 3.05 * GIB,
    ("llama-3.1-8b", Q.IQ2_M): 2.74 * GIB,
    ("llama-3.1-8b", Q.IQ2_S): 2.56 * GIB,
    ("llama-3.1-8b", Q.IQ2_XS): 2.43 * GIB,
    ("llama-3.1-8b", Q.IQ2_XXS): 2.24 * GIB,
    # Written by this trainer; 576 is no multiple of 256, so other blocks are taken.
    ("smollm2-135m", Q.F32): 540 * MB,
    ("smollm2-135m", Q.F16): 271 * MB,
    ("smollm2-135m", Q.Q8_0): 145 * MB,
    ("smollm2-135m", Q.Q4_K_M): 105 * MB,
    ("smollm2-135m", Q.IQ4_XS): 91 * MB,
    ("smollm2-135m", Q.Q3_K_M): 94 * MB,
}


@pytest.mark.parametrize(("file", "size"), FILES.items(), ids=[f"{m} {q}" for m, q in FILES])
def test_the_size_of_a_gguf_file(file: tuple[str, Quantization], size: float) -> None:
    model, kind = file
    assert gguf_bytes(shape(model), kind) == pytest.approx(size, rel=0.04)


def test_a_training_needs_the_model_and_some_checkpoints() -> None:
    need = training_disk(shape("llama-3.2-1b"), Training(), 2_500_000_000)
    assert need.model == 2_500_000_000
    assert need.work == 11 * 4 * 3_407_872


def test_checkpoints_of_all_weights_are_whole() -> None:
    """Weights and two moments, with earlyStopping the best weights as well; in float32."""
    one, full = shape("llama-3.2-1b"), Training(method="full")
    stopping = full.model_copy(update={"early_stopping": EarlyStopping()})
    assert training_disk(one, full, 0).work == 11 * 4 * one.parameters
    assert training_disk(one, stopping, 0).work == 14 * 4 * one.parameters
    need = export_disk(one, full, Export(gguf=()), 0)
    assert need.work == (4 + 2) * one.parameters
    adapter = Export(gguf=(Q.F16,)), Export(gguf=(Q.F16,), adapter_gguf=False)
    with_gguf, without = (export_disk(one, full, export, 0).work for export in adapter)
    assert with_gguf == without, "there is no adapter to convert"


def test_an_export_needs_the_base_and_what_it_writes() -> None:
    one = shape("llama-3.1-8b")
    need = export_disk(one, Training(), Export(), 16_060_000_000)
    files = [gguf_bytes(one, kind) for kind in (Q.BF16, Q.F16, Q.Q8_0, Q.Q4_K_M)]
    assert need.model == 16_060_000_000
    assert need.work == pytest.approx(2 * one.parameters + sum(files), rel=0.02)
    float16 = export_disk(one, Training(), Export(), 0, Q.F16)
    assert need.work - float16.work == files[0]


def test_a_merged_model_that_nobody_asked_for_is_gone_before_the_quantizations() -> None:
    one = shape("llama-3.1-8b")
    merged, sixteen = 2 * one.parameters, gguf_bytes(one, Q.BF16)
    few = export_disk(one, Training(), Export(merged=False, gguf=(Q.Q4_K_M,)), 0)
    assert merged + sixteen < few.work < 1.03 * (merged + sixteen)
    kinds = (Q.BF16, Q.Q8_0, Q.Q6_K, Q.Q5_K_M, Q.Q4_K_M)
    many = export_disk(one, Training(), Export(merged=False, gguf=kinds), 0)
    files = sum(gguf_bytes(one, kind) for kind in kinds)
    assert merged + sixteen < files < many.work < 1.03 * files
    without = export_disk(one, Training(), Export(merged=False, gguf=kinds, adapter_gguf=False), 0)
    assert many.work - without.work == 4 * one.adapter(Training().lora)


def test_an_adapter_alone_needs_next_to_nothing() -> None:
    need = export_disk(shape("llama-3.1-8b"), Training(), Export(merged=False, gguf=()), 16 * GIB)
    assert need.total < GIB


def test_only_what_is_downloaded_counts() -> None:
    sizes = {"model.safetensors": 100, "config.json": 1}
    assert downloaded("org/name", sizes) == 101
    assert downloaded("s3://bucket/model", sizes) == 101
    assert downloaded("/mnt/model", sizes) == 0


@pytest.mark.parametrize(
    ("settings", "copied"),
    [
        (None, False),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, True),
        ({"format": "mxfp4"}, True),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, False),
    ],
)
def test_a_copy_in_16_bits_counts_where_one_is_made(
    settings: dict[str, Any] | None, copied: bool, tmp_path: Path
) -> None:
    """A format that isn't read stays as it is."""
    quantization = {"quantization_config": settings} if settings else {}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **quantization}))
    config = report_facts.config()
    model = Model(source="org/model")
    config = config.model_copy(update={"model": model})
    files = BaseModelFiles(model, "revision", {"model.safetensors": 100})
    llama = shape("llama-3.1-8b")
    size = model_on_disk(config, files, ModelFolder(tmp_path), llama)
    assert size == 100 + (2 * llama.parameters if copied else 0)


def test_too_little_disk_is_refused_with_the_size_that_is_enough() -> None:
    need = DiskNeed(model=5 * GIB, work=3 * GIB)
    check_disk(need, need.total, "The training", "set the limit to")
    with pytest.raises(StageError) as raised:
        check_disk(need, 6 * GIB, "The training", "set ephemeral-storage to")
    assert raised.value.reason is Reason.OUT_OF_DISK
    assert raised.value.message == (
        "The training needs 8.2 GiB of disk (the base model alone is 5.0 GiB), and there are "
        "6.0 GiB: set ephemeral-storage to at least 9Gi."
    )
