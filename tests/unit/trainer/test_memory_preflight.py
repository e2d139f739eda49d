"""Memory, and room on the disk, are looked at before an export takes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from finetune_trainer.contract import (
    Export,
    PreparedRunConfig,
    Quantization,
    Reason,
    StageError,
)
from finetune_trainer.export import export_stage
from finetune_trainer.export.export_stage import check_memory, check_space, memory_need
from finetune_trainer.export.merge import MergedWeights, TensorInfo
from finetune_trainer.runtime import GIB
from tests.unit.trainer.test_memory_shape import config


def run(tmp_path: Path, **changes: int) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({**config("smollm2-135m"), **changes}))
    settings = PreparedRunConfig.model_validate(
        {
            "model": {"source": str(base)},
            "dataset": {"source": "/data.csv"},
            "output": {"uri": "/out"},
            "resolved": {
                "fingerprints": {"prepare": "a", "train": "b", "export": "c"},
                "datasetETag": "etag",
                "datasetRows": 1,
                "modelRevision": "1",
            },
        }
    )
    check_space(settings, base, tmp_path, Quantization.BF16)


def test_a_small_model_has_room(tmp_path: Path) -> None:
    run(tmp_path)


def test_a_model_that_no_disk_holds(tmp_path: Path) -> None:
    with pytest.raises(StageError) as raised:
        run(tmp_path, num_hidden_layers=300_000, hidden_size=16_384, intermediate_size=65_536)
    assert raised.value.reason is Reason.OUT_OF_DISK
    assert "stages.export.resources.limits.ephemeral-storage" in raised.value.message


def test_a_model_whose_widths_are_not_known_is_left_to_try(tmp_path: Path) -> None:
    run(tmp_path, num_experts=8)


def tensor(name: str, *widths: int) -> TensorInfo:
    return TensorInfo(name, torch.bfloat16, widths, "model.safetensors")


class Weights(MergedWeights):
    """Of which only names and sizes are known."""

    def __init__(self, *infos: TensorInfo) -> None:
        self.infos = {info.name: info for info in infos}


SMALL = Weights(tensor("model.embed_tokens.weight", 1000, 64))
LARGE = Weights(
    tensor("model.embed_tokens.weight", 128_256, 8192),
    *(tensor(f"model.layers.{n}.mlp.up_proj.weight", 28_672, 8192) for n in range(250)),
)
EXPERTS = Weights(
    *(
        tensor(f"model.layers.{layer}.mlp.experts.{n}.up_proj.weight", 2048, 768)
        for layer in range(48)
        for n in range(128)
    )
)


def have(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_stage, "free_memory", lambda: memory)


def test_a_pod_with_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    have(GIB, monkeypatch)
    with pytest.raises(StageError) as raised:
        check_memory(SMALL, Export())
    assert raised.value.reason is Reason.OUT_OF_MEMORY
    assert raised.value.message == (
        "The export needs 1.5 GiB of memory, and there are 1.0 GiB: set "
        "spec.stages.export.resources.limits.memory to at least 2Gi."
    )


def test_a_pod_with_what_the_message_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    have(2 * GIB, monkeypatch)
    check_memory(SMALL, Export())


def test_the_largest_matrix_and_experts_count() -> None:
    assert memory_need(LARGE, Export()) == 3 * GIB // 2 + 7 * 128_256 * 8192
    assert memory_need(LARGE, Export(gguf=())) == 3 * GIB // 2
    weights = 2 * 48 * 128 * 2048 * 768
    assert memory_need(EXPERTS, Export()) == 3 * GIB // 2 + weights
    unmeasured = memory_need(EXPERTS, Export(verify="off"))
    assert unmeasured == 3 * GIB // 2 + 7 * 128 * 2048 * 768  # of one layer


def test_a_model_that_does_not_fit_says_how_long_it_is_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    have(32 * GIB, monkeypatch)
    check_memory(LARGE, Export())
    assert "read from the disk again and again" in caplog.text
    assert "about 8 minutes each time at 250 MB/s" in caplog.text
    assert "limits.memory: 120Gi" in caplog.text
    caplog.clear()
    have(130 * GIB, monkeypatch)
    check_memory(LARGE, Export())
    check_memory(LARGE, Export(verify="off"))
    assert not caplog.text
