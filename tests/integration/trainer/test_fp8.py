"""The merged model in FP8, as compressed-tensors itself reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

from finetune_trainer.contract import Export, Quantization, Reason, RunConfig, StageError
from finetune_trainer.export import pipeline
from finetune_trainer.export.gate.rows import ExampleFiles
from finetune_trainer.export.inputs import ExportContext, open_tuned_model
from finetune_trainer.export.merge import MergedWeights
from finetune_trainer.export.merge.model_folder import fp8_problem, write_fp8
from finetune_trainer.model import ModelFolder, converter
from finetune_trainer.model.tokenizer import load_tokenizer
from finetune_trainer.prepare.checks import check_experts, check_few_bits
from finetune_trainer.runtime.reporter import Reporter
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


def test_what_is_written_is_read_back(place: Path) -> None:
    assert fp8_problem(opened(place), place / "fp8") is None


@pytest.mark.parametrize("fault", ["scale", "value", "swapped", "missing", "sixteen"])
def test_a_fault_in_what_was_written_is_found(place: Path, tmp_path: Path, fault: str) -> None:
    """A scale off by one channel, a lost bit, two layers in each other's place, ..."""
    folder = Path(shutil.copytree(place / "fp8", tmp_path / "fp8"))
    tensors = load_file(folder / SINGLE)
    name, other = (f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1))
    said = f"of {name} isn't the merged model's in FP8"
    if fault == "scale":
        tensors[f"{name}_scale"] = torch.roll(tensors[f"{name}_scale"], 1, dims=0)
    elif fault == "value":
        tensors[name][5, 3] = -tensors[name].float()[5, 3]
        said = f"row 5 {said}"
    elif fault == "swapped":
        for end in ("", "_scale"):
            one, two = tensors[name + end], tensors[other + end]
            tensors[name + end], tensors[other + end] = two, one
    elif fault == "missing":
        del tensors[name]
        said = f"{name} is missing"
    else:
        tensors["model.norm.weight"] *= 1.01
        said = "row 0 of model.norm.weight isn't"
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    assert said in str(fp8_problem(opened(place), folder))


@pytest.mark.parametrize("verify", ["fail", "off"])
def test_an_export_publishes_only_what_it_could_read_back(
    place: Path,
    smollm2_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verify: str,
) -> None:
    """Where two scales were exchanged as it was written: nothing, unless nobody was to look."""

    def faulty(weights: MergedWeights, merged: Path, target: Path, *_: object) -> None:
        write_fp8(weights, merged, target)
        tensors = load_file(target / SINGLE)
        scale = next(name for name in tensors if name.endswith("_scale"))
        tensors[scale] = torch.roll(tensors[scale], 1, dims=0)
        save_file(tensors, target / SINGLE, {"format": "pt"})

    published = list[str]()

    def add_file(_path: Path, name: str, *_: object, **__: object) -> None:
        published.append(name)

    load_tokenizer(ModelFolder(smollm2_folder)).save_pretrained(place / "adapter")
    context = export_context(place, tmp_path, add_file, verify)
    monkeypatch.setattr(pipeline, "write_fp8", faulty)
    if verify == "off":
        pipeline.make_models(context)
        assert f"merged-fp8/{SINGLE}" in published
        return
    with pytest.raises(StageError, match=r"merged-fp8/: row .* isn't the merged model's") as raised:
        pipeline.make_models(context)
    assert raised.value.reason is Reason.QUALITY_GATE_FAILED
    assert published == []
    monkeypatch.undo()
    pipeline.make_models(context)
    assert f"merged-fp8/{SINGLE}" in published


def export_context(place: Path, folder: Path, add_file: Any, verify: str) -> ExportContext:
    """An export of nothing but FP8."""
    settings = {
        "model": {"source": str(place / "base")},
        "dataset": {"source": str(folder / "rows.jsonl")},
        "output": {"uri": str(folder / "out")},
        "export": {"gguf": [], "merged": False, "mergedFp8": True, "verify": verify},
    }
    config = RunConfig.model_validate(settings)
    base, merged = ModelFolder(place / "base"), folder / "merged"
    return ExportContext(
        config=config,
        model=open_tuned_model(config, base, place / "adapter", merged),
        examples=ExampleFiles(folder / "rows.jsonl", None),
        result=folder / "result",
        workspace=folder,
        add_file=add_file,
        reporter=Reporter(),
    )


def opened(place: Path) -> MergedWeights:
    return MergedWeights.open(place / "base", place / "adapter")


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
