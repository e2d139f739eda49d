"""Memory, and room on the disk, are looked at before an export takes them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer.contract import (
    Export,
    Notice,
    NoticeCode,
    PreparedRunConfig,
    Quantization,
    Reason,
    StageError,
)
from finetune_trainer.export import export_stage
from finetune_trainer.export.export_stage import (
    check_memory,
    check_space,
    memory_need,
    widths_of,
)
from finetune_trainer.export.merge import MergedWeights, TensorInfo
from finetune_trainer.memory.forecast import STAGE_BYTES, ExportWork, Widths
from finetune_trainer.runtime import GIB, duration
from finetune_trainer.runtime.reporter import Reporter
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
    tensor("model.layers.0.self_attn.k_proj.weight", 1024, 8192),
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


class Told(Reporter):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[Notice] = []

    def notice(self, notice: Notice) -> None:
        self.said.append(notice)


def look(weights: Weights, **export: Any) -> tuple[float, Notice | None]:
    """What an export of these weights says of its time, on 8 CPUs."""
    parameters = sum(math.prod(info.shape) for info in weights.infos.values())
    reporter = Told()
    work = ExportWork(parameters, Export.model_validate(export))
    seconds = check_memory(weights, work, 8, reporter)
    return sum(seconds.values()), next(iter(reporter.said), None)


def test_a_pod_with_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    have(GIB // 2, monkeypatch)
    with pytest.raises(StageError) as raised:
        look(SMALL)
    assert raised.value.reason is Reason.OUT_OF_MEMORY
    assert raised.value.message == (
        "The export needs 836 MiB of memory, and there are 512 MiB: set "
        "spec.stages.export.resources.limits.memory to at least 836Mi."
    )


def test_a_pod_with_what_the_message_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    have(GIB, monkeypatch)
    assert look(SMALL)[1] is None


def test_the_largest_matrix_and_experts_count() -> None:
    """The converter has a matrix in float32, and transformers stacks experts."""
    assert memory_need(LARGE, Export()) == 2 * STAGE_BYTES + 8 * 128_256 * 8192
    assert memory_need(LARGE, Export(gguf=(), verify="off")) == 2 * STAGE_BYTES
    unmeasured = memory_need(EXPERTS, Export(verify="off"))
    assert unmeasured == 2 * STAGE_BYTES + 8 * 128 * 2048 * 768  # of one layer
    q8 = Export(gguf=(Quantization.F16, Quantization.Q8_0))
    matrix = q8.model_copy(update={"importance_matrix": True})
    assert memory_need(EXPERTS, matrix) == memory_need(EXPERTS, q8), "no type takes the matrix"
    assert memory_need(EXPERTS, Export()) > 2 * STAGE_BYTES + 2 * 48 * 128 * 2048 * 768


def test_widths_are_those_of_the_matrices() -> None:
    weights = Weights(
        tensor("model.embed_tokens.weight", 1000, 64),
        tensor("model.norm.weight", 64),
        *(
            tensor(f"model.layers.{layer}.{name}.weight", *widths)
            for layer in range(3)
            for name, widths in {
                "self_attn.q_proj": (96, 64),
                "self_attn.k_proj": (32, 64),
                "mlp.up_proj": (256, 64),
                "mlp.down_proj": (64, 256),
            }.items()
        ),
    )
    assert widths_of(weights) == Widths(1000, 64, 256, 32, 3)


def test_a_model_that_does_not_fit_says_how_long_that_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """120 GB in 16 bits, in a pod of 32 GiB, and in one that holds it."""
    have(32 * GIB, monkeypatch)
    longer, notice = look(LARGE)
    assert notice is not None
    assert notice.code == NoticeCode.MODEL_READ_AGAIN
    assert not notice.warning
    have(140 * GIB, monkeypatch)
    enough, none = look(LARGE)
    assert none is None
    assert longer > 1.3 * enough
    assert f"takes about {duration(longer)}, and {duration(enough)} with" in notice.evidence
    assert "limits.memory to 120Gi" in notice.remedy
    have(32 * GIB, monkeypatch)
    assert look(LARGE, verify="off")[1] is None
