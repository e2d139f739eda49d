"""Base models in fewer than 16 bits: read as transformers and compressed-tensors do, or refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig, Mxfp4Config

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.export.merge import MergedWeights
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.converter import local_header, weight_files
from finetune_trainer.model.prequantized import (
    WideningRequest,
    is_quantized,
    widen,
    write_whole,
)
from finetune_trainer.model.widening import widen_here
from tests.integration.trainer import test_experts as experts
from tests.integration.trainer.adapters import INDEX, save_adapter, save_base
from tests.integration.trainer.narrow import (
    WEIGHTS,
    spread,
    to_compressed,
    to_fp8,
    to_mxfp4,
    write,
)

INT4 = {"num_bits": 4, "type": "int", "symmetric": True}
INT8 = {**INT4, "num_bits": 8}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8-tensor": ("float-quantized", {**FP8, "strategy": "tensor"}),
    "fp8-channel": ("float-quantized", {**FP8, "strategy": "channel"}),
    "fp8-block": ("float-quantized", {**FP8, "strategy": "block", "block_structure": [32, 16]}),
    "int8-channel": ("int-quantized", {**INT8, "strategy": "channel"}),
    "int4-group": ("pack-quantized", {**INT4, "strategy": "group", "group_size": 16}),
    "int4-zero": (
        "pack-quantized",
        {**INT4, "strategy": "group", "group_size": 16, "symmetric": False},
    ),
    "int8-packed": ("pack-quantized", {**INT8, "strategy": "channel"}),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("narrow") / "dense")


def as_loaded(folder: Path, settings: Any = None) -> dict[str, torch.Tensor]:
    """The weights in bfloat16 as transformers dequantizes them."""
    options = {} if settings is None else {"quantization_config": settings}
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.bfloat16, **options)
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


def widened(folder: Path, target: Path) -> Path:
    """In this process what the trainer has another one do."""
    widen_here(WideningRequest(source=folder, target=target))
    assert not is_quantized(target)
    return target


def assert_same(ours: Path, theirs: dict[str, torch.Tensor]) -> None:
    """Bit for bit, as transformers reads both."""
    found = as_loaded(ours)
    other = ("_scale", "_scale_inv", "_zero_point", "_shape", "_packed")
    assert found.keys() == {name for name in theirs if not name.endswith(other)}
    for name, tensor in found.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_fp8_in_blocks_is_read_as_transformers_does(kind: str, dense: Path, tmp_path: Path) -> None:
    base = dense if kind == "llama" else experts.make(kind, tmp_path / "base")
    narrow = to_fp8(base, tmp_path / "narrow", (8, 8))
    ours = widened(narrow, tmp_path / "wide")
    assert_same(ours, as_loaded(narrow))
    size = (ours / WEIGHTS).stat().st_size
    assert abs(size - (base / WEIGHTS).stat().st_size) < 4096


@pytest.mark.parametrize("block", [(48, 40), (64, 2), (128, 1)])
def test_blocks_that_do_not_divide_a_matrix_are_cut(
    block: tuple[int, int], dense: Path, tmp_path: Path
) -> None:
    """In a wide matrix there may be as many blocks as rows."""
    narrow = to_fp8(dense, tmp_path / "narrow", block)
    found = load_file(widened(narrow, tmp_path / "wide") / WEIGHTS)
    tensors = load_file(narrow / WEIGHTS)
    scaled = [name for name in tensors if f"{name}_scale_inv" in tensors]
    assert scaled
    for name in scaled:
        values = tensors[name].float()
        exact = values * spread(tensors[f"{name}_scale_inv"], values, block)
        assert torch.equal(found[name], exact.bfloat16()), name


@pytest.mark.filterwarnings("ignore")
def test_mxfp4_is_read_as_transformers_does(tmp_path: Path) -> None:
    base = experts.make("gpt_oss", tmp_path / "base", intermediate_size=96)
    narrow = to_mxfp4(base, tmp_path / "narrow")
    ours = widened(narrow, tmp_path / "wide")
    assert_same(ours, as_loaded(narrow, Mxfp4Config(dequantize=True)))
    names = load_file(base / WEIGHTS).keys()
    assert load_file(ours / WEIGHTS).keys() == names, "the names of the model in 16 bits"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_tensors_are_read_as_by_themselves(
    kind: str, dense: Path, tmp_path: Path
) -> None:
    format_, weights = COMPRESSED[kind]
    narrow = to_compressed(dense, tmp_path / "narrow", format_, **weights)
    theirs = as_loaded(narrow, CompressedTensorsConfig(dequantize=True))
    assert_same(widened(narrow, tmp_path / "wide"), theirs)


def test_a_model_in_shards_is_written_in_shards_by_another_process(
    dense: Path, tmp_path: Path
) -> None:
    """A scale may be in another file than its weight."""
    whole = to_fp8(dense, tmp_path / "whole", (8, 8))
    narrow = shutil.copytree(whole, tmp_path / "narrow")
    tensors = load_file(narrow / WEIGHTS)
    (narrow / WEIGHTS).unlink()
    files = {
        name: f"model-0000{1 + (number % 2)}.safetensors"
        for number, name in enumerate(sorted(tensors))
    }
    for file in set(files.values()):
        save_file({n: tensors[n] for n in tensors if files[n] == file}, narrow / file)
    (narrow / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    steps: list[tuple[int, int]] = []
    wide = write_whole(
        ModelFolder(narrow), tmp_path / "wide", lambda done, total: steps.append((done, total))
    )
    assert steps[-1][0] == steps[-1][1]
    expected = load_file(widened(whole, tmp_path / "expected") / WEIGHTS)
    index = json.loads((wide.path / INDEX).read_bytes())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(wide.path / file)[name], expected[name])


def test_an_adapter_is_merged_into_the_16_bits(dense: Path, tmp_path: Path) -> None:
    wide = widened(to_fp8(dense, tmp_path / "narrow", (8, 8)), tmp_path / "wide")
    weights = MergedWeights.open(wide, save_adapter(wide, tmp_path / "adapter"))
    weights.check_changes()
    assert weights.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "nvfp4-pack-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float"}}},
            },
            "compressed-tensors, nvfp4-pack-quantized",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "mixed-precision",
                "config_groups": {
                    "group_0": {"format": "pack-quantized", "weights": INT4},
                    "group_1": {"format": "float-quantized", "weights": FP8},
                },
            },
            "compressed-tensors, float-quantized and pack-quantized in several groups",
        ),
    ],
)
def test_other_formats_are_refused_by_name(
    settings: dict[str, Any], words: str, dense: Path, tmp_path: Path
) -> None:
    narrow = write(dense, tmp_path / "narrow", load_file(dense / WEIGHTS), **settings)
    headers = {file: local_header(narrow / file)[1] for file in weight_files(narrow)}
    with pytest.raises(StageError, match=re.escape(f"quantized ({words})")) as caught:
        widen(json.loads((narrow / "config.json").read_bytes()), headers)
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED
    assert "name in spec.model.source the model in 16 bits" in caught.value.message


def test_narrow_values_without_a_scale_are_refused(dense: Path, tmp_path: Path) -> None:
    narrow = to_fp8(dense, tmp_path / "narrow", (8, 8))
    tensors = load_file(narrow / WEIGHTS)
    tensors.pop(next(name for name in tensors if name.endswith("_scale_inv")))
    save_file(tensors, narrow / WEIGHTS)
    with pytest.raises(StageError, match="F8_E4M3 that no scale belongs to"):
        widened(narrow, tmp_path / "wide")


def test_scales_of_other_blocks_than_the_named_ones_are_refused(
    dense: Path, tmp_path: Path
) -> None:
    narrow = to_fp8(dense, tmp_path / "narrow", (8, 8))
    file = narrow / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["weight_block_size"] = [8, 16]
    file.write_text(json.dumps(config))
    with pytest.raises(StageError, match="scales where blocks make") as caught:
        widened(narrow, tmp_path / "wide")
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED
