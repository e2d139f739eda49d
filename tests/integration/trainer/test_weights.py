"""Merged weights that are computed as they are read, against PEFT's own merge in memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune_trainer.contract import StageError
from finetune_trainer.export import merge
from finetune_trainer.export.merge import MergedWeights
from finetune_trainer.export.merge.deltas import Delta, read_adapter
from finetune_trainer.export.merge.model_folder import write_merged
from tests.integration.trainer.adapters import (
    INDEX,
    SINGLE,
    WEIGHTS,
    change,
    merge_in_memory,
    save_adapter,
    save_base,
    save_renamed,
)
from tests.integration.trainer.architectures import PACKABLE

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "whole modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "patterns": {
        "rank_pattern": {"o_proj": 7},
        "alpha_pattern": {"layers.1.self_attn.o_proj": 3},
    },
}


@pytest.fixture(autouse=True, params=[1])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many threads torch may use."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


ONE_AND_TWO = pytest.mark.parametrize("threads", [1, 2], indirect=True)


def write(base: Path, adapter: Path, folder: Path) -> Path:
    weights = MergedWeights.open(base, adapter)
    weights.check_changes()
    write_merged(weights, folder)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_each_kind_of_adapter_gives_the_file_that_peft_gives(
    tmp_path: Path, kind: str, variant: str
) -> None:
    base = save_base(tmp_path / "base", kind)
    adapter = save_adapter(base, tmp_path / "adapter", **VARIANTS[variant])
    theirs = merge_in_memory(base, adapter, tmp_path / "theirs")
    ours = write(base, adapter, tmp_path / "ours")
    assert (ours / SINGLE).read_bytes() == (theirs / SINGLE).read_bytes()
    assert (ours / SINGLE).read_bytes() != (base / SINGLE).read_bytes()


@pytest.mark.parametrize("kind", [kind for kind in PACKABLE if kind not in ("llama", "phi3")])
def test_each_architecture_gives_the_file_that_peft_gives(tmp_path: Path, kind: str) -> None:
    base = save_base(tmp_path / "base", kind)
    adapter = save_adapter(base, tmp_path / "adapter")
    theirs = merge_in_memory(base, adapter, tmp_path / "theirs")
    ours = write(base, adapter, tmp_path / "ours")
    assert (ours / SINGLE).read_bytes() == (theirs / SINGLE).read_bytes()
    assert len(MergedWeights.open(base, adapter).targets) == 21


@ONE_AND_TWO
@pytest.mark.parametrize("rank", [1, 16, 100])
@pytest.mark.parametrize("shape", [(1000, 576), (4099, 300), (64, 64), (130, 8192), (7, 16)])
def test_a_block_of_rows_has_the_bits_of_the_whole(shape: tuple[int, int], rank: int) -> None:
    """Also the last few rows, and one row alone; PEFT multiplies whole matrices."""
    torch.manual_seed(0)
    rows, columns = shape
    base = torch.randn(shape).bfloat16()
    delta = Delta(torch.randn(rank, columns), torch.randn(rows, rank), 0.37)
    whole = base.clone()
    whole += (delta.b @ delta.a) * delta.scale
    for size in (1, 63, 64, 257, rows):
        for start in sorted({0, rows // 2, max(0, rows - size)}):
            block = delta.merge(base[start : start + size], start)
            assert torch.equal(block.bfloat16(), whole[start : start + size]), (size, start)


def test_a_block_of_rows_with_dora_has_the_bits_of_the_whole() -> None:
    torch.manual_seed(0)
    base = torch.randn(1003, 576).bfloat16()
    delta = Delta(torch.randn(8, 576), torch.randn(1003, 8), 2.0, torch.rand(1003))
    whole = delta.merge(base, 0)
    for start in (0, 64, 100, 1000):
        assert torch.equal(delta.merge(base[start : start + 90], start), whole[start : start + 90])


@ONE_AND_TWO
def test_rows_are_those_of_the_whole_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "SPAN_BYTES", 1)  # several spans also for tiny tensors
    base = save_base(tmp_path / "base")
    weights = MergedWeights.open(base, save_adapter(base, tmp_path / "adapter"))
    theirs = load_file(merge_in_memory(base, tmp_path / "adapter", tmp_path / "theirs") / SINGLE)
    for name in ("model.layers.1.mlp.gate_proj.weight", "model.norm.weight", "lm_head.weight"):
        whole = weights.rows(name)
        assert torch.equal(whole, theirs[name])
        assert whole.shape == weights.infos[name].shape
        for start, stop in ((0, 1), (3, 50), (60, None), (0, 10_000), (10, 10)):
            assert torch.equal(weights.rows(name, start, stop), whole[start:stop])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sums_are_rounded_once_to_float16(tmp_path: Path, dtype: torch.dtype) -> None:
    base = save_base(tmp_path / "base", dtype=dtype)
    adapter = save_adapter(base, tmp_path / "adapter")
    write(base, adapter, tmp_path / "ours")
    stored, ours = load_file(base / SINGLE), load_file(tmp_path / "ours" / SINGLE)
    deltas = read_adapter(adapter).changes
    for name, value in ours.items():
        exact = stored[name].float()
        delta = deltas.get(name.removesuffix(".weight"))
        if isinstance(delta, Delta):
            exact += (delta.b @ delta.a) * delta.scale
        assert torch.equal(value, exact.half())


@pytest.mark.parametrize(
    ("largest", "expected"), [(59_000.0, torch.float16), (61_000.0, torch.bfloat16)]
)
def test_a_32_bit_model_keeps_its_digits_or_its_range(
    tmp_path: Path, largest: float, expected: torch.dtype
) -> None:
    base = save_base(tmp_path / "base", dtype=torch.float32)
    change(base / SINGLE, lambda tensors: tensors["lm_head.weight"][-1].fill_(-largest))
    weights = MergedWeights.open(base, save_adapter(base, tmp_path / "adapter"))
    assert weights.dtype is expected
    assert {info.dtype for info in weights.infos.values()} == {expected}
    assert MergedWeights.open(base, None, expected).dtype is expected


def test_shards_and_index_are_those_that_transformers_writes(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", max_shard_size="40KB")
    adapter = save_adapter(base, tmp_path / "adapter")
    weights, ours = MergedWeights.open(base, adapter), tmp_path / "ours"
    written: list[int] = []
    umask = os.umask(0o077)
    write_merged(weights, ours, written.append)
    os.umask(umask)
    files = {file.name: file for file in ours.iterdir()}
    shards = [file for name, file in files.items() if name != INDEX]
    assert len(shards) > 3
    assert sum(written) == sum(file.stat().st_size for file in shards)
    assert files[INDEX].read_bytes() == (base / INDEX).read_bytes()
    assert {file.stat().st_mode & 0o777 for file in files.values()} == {0o644}
    shutil.copy(base / "config.json", ours)
    loaded = AutoModelForCausalLM.from_pretrained(ours).state_dict()
    theirs = merge_in_memory(base, adapter, tmp_path / "theirs")
    for name, value in AutoModelForCausalLM.from_pretrained(theirs).state_dict().items():
        assert torch.equal(loaded[name], value)


def test_a_tensor_that_the_index_does_not_name_is_no_part_of_the_model(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", max_shard_size="40KB")
    shard = min(base.glob("*.safetensors"))
    change(shard, lambda tensors: tensors.update(left_over=torch.zeros(2)))
    assert "left_over" not in MergedWeights.open(base, None).infos


def test_a_merge_that_breaks_off_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", max_shard_size="40KB")
    adapter = save_adapter(base, tmp_path / "adapter")
    name = "base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"
    change(adapter / WEIGHTS, lambda tensors: tensors[name][-1].fill_(torch.nan))
    weights, ours = MergedWeights.open(base, adapter), tmp_path / "ours"
    with pytest.raises(StageError, match="not finite"):
        write_merged(weights, ours)
    broken = weights.infos["model.layers.2.mlp.up_proj.weight"].shard
    left = {file.name for file in ours.iterdir()}
    assert left
    assert left < {info.shard for info in weights.infos.values()}
    assert broken not in left


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_model_whose_weights_have_other_names_than_its_modules(
    tmp_path: Path, prefixed: bool
) -> None:
    """Gemma 3 with a vision tower, and a Llama saved without the "model." in front."""
    base = save_renamed(tmp_path / "base", prefixed)
    targets = ["q_proj", "gate_proj"]
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=targets)
    modules = read_adapter(adapter).changes
    weights = MergedWeights.open(base, adapter)
    assert len(weights.targets) == len(modules)
    assert not {f"{module}.weight" for module in modules} & set(weights.infos)
    theirs = merge_in_memory(base, adapter, tmp_path / "theirs")
    ours = write(base, adapter, tmp_path / "ours")
    shutil.copy(base / "config.json", ours)
    loaded = AutoModelForCausalLM.from_pretrained(ours).state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(theirs).state_dict().items():
        assert torch.equal(loaded[name], value), name


def test_text_need_not_change_a_vision_tower(tmp_path: Path) -> None:
    base = save_renamed(tmp_path / "base", vision=True)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])

    def forget(tensors: dict[str, torch.Tensor], part: str) -> None:
        for name, value in tensors.items():
            if part in name and "lora_B" in name:
                value.zero_()

    change(adapter / WEIGHTS, lambda tensors: forget(tensors, "vision_tower"))
    MergedWeights.open(base, adapter).check_changes()
    change(adapter / WEIGHTS, lambda tensors: forget(tensors, "language_model"))
    with pytest.raises(StageError, match="nothing in 3 of 4 targets"):
        MergedWeights.open(base, adapter).check_changes()


def test_a_copy_of_tied_embeddings_is_left_out(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gemma")
    tensors = load_file(base / SINGLE)
    copy = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": copy}, base / SINGLE, {"format": "pt"})
    adapter = save_adapter(base, tmp_path / "adapter")
    theirs = merge_in_memory(base, adapter, tmp_path / "theirs")
    assert (write(base, adapter, tmp_path / "ours") / SINGLE).read_bytes() == (
        theirs / SINGLE
    ).read_bytes()
    save_file({**tensors, "lm_head.weight": -copy}, base / SINGLE, {"format": "pt"})
    assert "lm_head.weight" in MergedWeights.open(base, adapter).infos


def test_an_embedding_that_is_the_output_layer_is_merged_as_peft_merges_it(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gemma")
    tied = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    adapter = save_adapter(base, tmp_path / "adapter", **tied)
    theirs = merge_in_memory(base, adapter, tmp_path / "theirs")
    ours = write(base, adapter, tmp_path / "ours")
    assert (ours / SINGLE).read_bytes() == (theirs / SINGLE).read_bytes()
    assert "model.embed_tokens.weight" in MergedWeights.open(base, adapter).targets
    # Another output layer under the second name can't be merged: the base has one for both.
    name = "base_model.model.lm_head.weight"
    change(adapter / WEIGHTS, lambda tensors: tensors[name].mul_(2))
    with pytest.raises(StageError, match=r"lm_head.*tie_word_embeddings"):
        MergedWeights.open(base, adapter)


def test_an_output_layer_of_its_own_is_merged(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules="(.*q_proj|lm_head)")
    theirs = merge_in_memory(base, adapter, tmp_path / "theirs")
    ours = write(base, adapter, tmp_path / "ours")
    assert (ours / SINGLE).read_bytes() == (theirs / SINGLE).read_bytes()
    assert "lm_head.weight" in MergedWeights.open(base, adapter).targets


def test_what_the_base_keeps_in_float32_stays_so(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(base, tmp_path / "adapter")
    stored = load_file(base / SINGLE)
    norm = "model.norm.weight"
    target = "model.layers.0.self_attn.q_proj.weight"  # which the merge changes
    exact = torch.linspace(1, 1.1, stored[norm].numel())
    change_tensors = {norm: exact, target: stored[target].float()}
    save_file({**stored, **change_tensors}, base / SINGLE, metadata={"format": "pt"})
    ours = load_file(write(base, adapter, tmp_path / "ours") / SINGLE)
    assert torch.equal(ours[norm], exact)
    assert {name: each.dtype for name, each in ours.items() if name != norm} == dict.fromkeys(
        ours.keys() - {norm}, torch.bfloat16
    )
