"""The merged model in FP8, as compressed-tensors itself reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

from finetune_trainer.contract import Export, Quantization, StageError
from finetune_trainer.export.merge import MergedWeights
from finetune_trainer.export.merge.model_folder import write_fp8
from finetune_trainer.model import converter
from finetune_trainer.prepare.checks import check_experts, check_few_bits
from tests.integration.trainer.adapters import SINGLE, merge_in_memory, save_adapter, save_base

ROUNDING = 2.0**-4  # of a value: e4m3 has three bits behind the point


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEFT's merge, and ours in FP8."""
    place = tmp_path_factory.mktemp("fp8")
    base = save_base(place / "base", "llama")
    adapter = save_adapter(base, place / "adapter")
    merge_in_memory(base, adapter, place / "merged")
    write_fp8(MergedWeights.open(base, adapter), place / "merged", place / "fp8")
    return place


def test_compressed_tensors_reads_the_merged_weights(place: Path) -> None:
    merged = AutoModelForCausalLM.from_pretrained(place / "merged").state_dict()
    dequantized = CompressedTensorsConfig(dequantize=True)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        read: Any = AutoModelForCausalLM.from_pretrained(
            place / "fp8", quantization_config=dequantized
        )
    read = {name: each for name, each in read.state_dict().items() if not name.endswith("_scale")}
    assert read.keys() == merged.keys()
    narrow = {name for name in read if not torch.equal(read[name], merged[name])}
    assert narrow == {name for name in read if "_proj.weight" in name}
    for name in narrow:
        assert is_rounded(read[name].float(), merged[name].float()), name
        shifted = torch.roll(read[name].float(), 1, dims=0)
        assert not is_rounded(shifted, merged[name].float()), "another channel's scale would show"


def is_rounded(read: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether each value is the nearest that FP8 has in its row, and a scale in 8 bits."""
    step = exact.abs().amax(1, keepdim=True) / 448 * 2.0**-9  # e4m3's smallest
    return bool(((read - exact).abs() <= exact.abs() * (ROUNDING + 2.0**-8) + step).all())


def test_types_and_settings_are_the_formats(place: Path) -> None:
    config = json.loads((place / "fp8" / "config.json").read_bytes())
    settings = config["quantization_config"]
    QuantizationConfig.model_validate(settings)  # which knows no other field
    assert settings["format"] == "float-quantized"
    assert settings["ignore"] == ["lm_head"]
    tensors = load_file(place / "fp8" / SINGLE)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            assert tensor.dtype is torch.float8_e4m3fn
            scale = tensors[f"{name}_scale"]
            assert scale.shape == (tensor.shape[0], 1)
            assert tensor.float().abs().amax(1).min() >= 416, "each row uses the whole range"
        else:
            assert tensor.dtype is torch.bfloat16
    sizes = [(place / each / SINGLE).stat().st_size for each in ("merged", "fp8")]
    assert sizes[1] < sizes[0]


def test_stacked_experts_are_refused_before_a_training() -> None:
    stacked = {"model.layers.0.mlp.experts.gate_up_proj": tensor(4, 8, 8)}
    with pytest.raises(StageError, match="stacks its experts"):
        check_experts({SINGLE: stacked})
    check_experts({SINGLE: {"model.layers.0.mlp.experts.0.up_proj.weight": tensor(8, 8)}})


def test_experts_are_refused_in_types_that_need_a_matrix_of_each() -> None:
    experts = {SINGLE: {"model.layers.0.mlp.experts.0.up_proj.weight": tensor(8, 8)}}
    few = Export(gguf=(Quantization.Q8_0, Quantization.IQ2_M), importance_matrix=True)
    with pytest.raises(StageError, match=r"IQ2_M.*leave these types out"):
        check_few_bits(few, experts)
    check_few_bits(Export(), experts)
    check_few_bits(few, {SINGLE: {"model.layers.0.mlp.up_proj.weight": tensor(8, 8)}})


def tensor(*widths: int) -> converter.TensorHeader:
    return converter.TensorHeader("BF16", list(widths), (0, 0))
