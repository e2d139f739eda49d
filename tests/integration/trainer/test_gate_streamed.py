"""A model whose weights stay in their files computes what a loaded one does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from finetune_trainer.export.reference import MeasuredRow, float32, passes
from finetune_trainer.export.reference.float32 import load_streamed, logits_of, logits_of_both
from finetune_trainer.model import ModelFolder, loading
from finetune_trainer.model.loading import MappedWeight, load_model
from tests.integration.trainer.adapters import save_adapter, save_base
from tests.integration.trainer.architectures import PACKABLE, VOCABULARY, tiny

FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
SEPARATE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = [MeasuredRow(tuple(range(1, 40)), (20, 21, 38)), MeasuredRow(tuple(range(60, 70)), (3, 9))]


def save(kind: str, folder: Path, dtype: torch.dtype, **lora: Any) -> tuple[Path, Path]:
    """A tiny model in 16 bits, and an adapter that changes it much."""
    base, adapter = folder / "base", folder / "adapter"
    tiny(kind, dtype).save_pretrained(base)
    targets = FUSED if kind == "phi3" else SEPARATE
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **lora)
    get_peft_model(load_model(ModelFolder(base), "auto", "cpu"), config).save_pretrained(
        str(adapter)
    )
    return base, adapter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", PACKABLE)
def test_it_computes_what_a_loaded_model_does(
    kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, but for the order of sums: blocks of a few rows at a time."""
    monkeypatch.setattr(loading, "BLOCK_VALUES", 640)
    base, adapter = save(kind, tmp_path, dtype)
    loaded = PeftModel.from_pretrained(
        load_model(ModelFolder(base), torch.float32, "cpu"), adapter
    ).eval()
    ours = load_streamed(ModelFolder(base), adapter)
    assert isinstance(ours, PeftModel)
    tuned = logits_of(loaded, ROWS)
    assert tuned.shape == (5, VOCABULARY)
    torch.testing.assert_close(logits_of(ours, ROWS), tuned, rtol=1e-4, atol=1e-4)
    with loaded.disable_adapter(), ours.disable_adapter():
        alone = logits_of(loaded, ROWS)
        torch.testing.assert_close(logits_of(ours, ROWS), alone, rtol=1e-4, atol=1e-4)
    both = torch.cat([tuned, alone])
    torch.testing.assert_close(logits_of_both(ours, ROWS), both, rtol=1e-4, atol=1e-4)
    assert (tuned - alone).abs().max() > 1


@pytest.mark.parametrize("variant", ["use_rslora", "use_dora"])
def test_variants_of_lora_are_those_of_peft(variant: str, tmp_path: Path) -> None:
    base, adapter = save("llama", tmp_path, torch.bfloat16, **{variant: True})
    loaded = PeftModel.from_pretrained(
        load_model(ModelFolder(base), torch.float32, "cpu"), adapter
    ).eval()
    ours = load_streamed(ModelFolder(base), adapter)
    torch.testing.assert_close(logits_of(ours, ROWS), logits_of(loaded, ROWS))
    with loaded.disable_adapter():
        both = torch.cat([logits_of(ours, ROWS), logits_of(loaded, ROWS)])
    assert isinstance(ours, PeftModel)
    torch.testing.assert_close(logits_of_both(ours, ROWS), both)


def test_tuned_and_base_model_share_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each weight is read once for both; with DoRA, which PEFT can't mix, twice."""
    read: list[int] = []
    blockwise = loading._BLOCKWISE[torch.nn.functional.linear]

    def counted(*args: Any) -> torch.Tensor:
        read.append(args[1].source.data_ptr())
        return blockwise(*args)

    monkeypatch.setitem(loading._BLOCKWISE, torch.nn.functional.linear, counted)
    for variant, times in ((False, 1), (True, 2)):
        base, adapter = save("llama", tmp_path / f"{variant}", torch.bfloat16, use_dora=variant)
        model = load_streamed(ModelFolder(base), adapter)
        assert isinstance(model, PeftModel)
        read.clear()
        logits_of_both(model, ROWS)
        assert {read.count(place) for place in set(read)} == {times}


@pytest.mark.parametrize(
    ("kind", "whole"),
    [
        ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("gemma", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ],
)
def test_modules_that_were_trained_as_a_whole(
    kind: str, whole: dict[str, Any], tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", kind)
    adapter = save_adapter(base, tmp_path / "adapter", **whole)
    model = load_model(ModelFolder(base), torch.float32, "cpu")
    loaded = PeftModel.from_pretrained(model, adapter)
    loaded.train(False)
    ours = load_streamed(ModelFolder(base), adapter)
    assert isinstance(ours, PeftModel)
    torch.testing.assert_close(logits_of(ours, ROWS), logits_of(loaded, ROWS))
    with loaded.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(logits_of(ours, ROWS), logits_of(loaded, ROWS))


def test_a_row_is_computed_alike_alone_and_beside_others(tmp_path: Path) -> None:
    """Padding changes nothing."""
    base, adapter = save("mistral", tmp_path, torch.bfloat16)
    model = load_streamed(ModelFolder(base), adapter)
    alone = torch.cat([logits_of(model, [row]) for row in ROWS])
    torch.testing.assert_close(logits_of(model, ROWS), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_on_another_device_all_is_computed_there_and_the_weights_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By tensors without values, which torch seldom lets meet others. No GPU has run it.

    Rows of an embedding are chosen where it is, so that ids have to be read there.
    """
    base, adapter = save("llama", tmp_path, torch.bfloat16)
    there = torch.device("meta")
    monkeypatch.setattr(float32, "best_device", lambda: there)
    model = load_streamed(ModelFolder(base), adapter)
    assert isinstance(model, PeftModel)
    assert {each.device for each in model.parameters()} == {there}
    assert {each.device for each in model.buffers()} == {there}
    weights = [each.data for each in model.parameters() if isinstance(each.data, MappedWeight)]
    assert len(weights) > 20
    assert {weight.source.device.type for weight in weights} == {"cpu"}

    def embed(ids: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.empty((*ids.shape, weight.shape[1]), device=ids.device)

    monkeypatch.setitem(loading._BLOCKWISE, torch.nn.functional.embedding, embed)
    plain = cast("PreTrainedModel", model.get_base_model())
    plain.set_attn_implementation("eager")  # the usual one reads the mask
    logits = logits_of_both(model, ROWS)
    assert (logits.device, logits.shape) == (there, (10, VOCABULARY))


def test_inputs_of_linear_layers_can_be_watched(tmp_path: Path) -> None:
    base, _ = save("llama", tmp_path, torch.bfloat16)
    model = load_streamed(ModelFolder(base), None)
    seen: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.__setitem__(name, args[0].shape[-1])
            )
    logits_of(model, ROWS)
    assert len(seen) == 3 * 7 + 1
    assert seen["model.layers.2.mlp.down_proj"] == 96


def test_passes_are_bounded() -> None:
    long, many = (
        MeasuredRow(tuple(range(1000)), (999,)),
        MeasuredRow(tuple(range(130)), tuple(range(2, 130))),
    )
    short = MeasuredRow((1, 2, 3), (2,))
    assert list(passes([short, short, long, many, short])) == [
        [short, short],
        [long],
        [many],
        [short],
    ]


def test_the_weights_take_no_memory(smollm2_folder: Path) -> None:
    """270 MB of weights; measured: 30 MB of anonymous memory more, mostly activations."""
    program = f"""
import torch
from pathlib import Path
from finetune_trainer.export.reference.float32 import load_streamed
from finetune_trainer.model import ModelFolder, loading

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def largest(seen):
    return lambda *_: seen.append(anonymous())

before, seen = anonymous(), []
model = load_streamed(ModelFolder(Path({str(smollm2_folder)!r})), None)
for module in model.modules():
    module.register_forward_hook(largest(seen))
with torch.no_grad():
    model(torch.arange(1, 50)[None])
print((max(seen) - before) // 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(done.stdout.split()[-1]) < 150
