"""Widths and parameter counts from config.json, against the models that transformers builds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract import Lora, TargetModule
from finetune_trainer.model.shape import Shape

EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
MODELS = Path(__file__).parents[2] / "data" / "models"

PARAMETERS = {
    # As the models' own pages and safetensors headers give them.
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "smollm2-135m": 134_515_008,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "gemma-2b": 2_506_172_416,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "phi-3-mini": 3_821_079_552,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
    "gpt-oss-20b": 20_914_757_184,
}


def config(name: str) -> dict[str, Any]:
    return dict(json.loads((MODELS / f"{name}.json").read_text()))


def shape(name: str) -> Shape:
    found = Shape.from_config(config(name))
    assert found is not None
    return found


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items(), ids=list(PARAMETERS))
def test_the_parameters_of_published_models(name: str, count: int) -> None:
    assert shape(name).parameters == count


def test_a_mixture_that_transformers_5_saved_is_the_same() -> None:
    """It names the number of experts alike for all."""
    saved = config("qwen3-30b-a3b")
    saved["num_local_experts"] = saved.pop("num_experts")
    assert Shape.from_config(saved) == shape("qwen3-30b-a3b")


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        (name, targets)
        for name in [*PARAMETERS, "gemma-3-4b"]
        for targets in ("attention", "all")
        if targets == "all" or not shape(name).experts  # each costs a second
    ],
)
def test_base_and_adapter_are_those_of_transformers_and_peft(name: str, targets: str) -> None:
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from finetune_trainer.model.adapter import lora_config

    settings = config(name)
    settings = settings.get("text_config", settings)
    modules = tuple(TargetModule)[: 4 if targets == "attention" else 7]
    lora = Lora(r=8, target_modules=modules)
    if shape(name).experts:
        lora = Lora(r=8, dropout=0, target_parameters=EXPERTS)
    kind = settings.pop("model_type")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call] # transformers
            AutoConfig.for_model(kind, **settings)
        )
        base = model.num_parameters()
        tuned = get_peft_model(model, lora_config(lora, model))
    assert shape(name).parameters == base
    trainable = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    assert shape(name).adapter(lora) == trainable
    if targets == "all":
        linear = lora.model_copy(update={"target_modules": ("all-linear",)})
        assert shape(name).adapter(linear) == trainable


def test_a_mixture_by_hand() -> None:
    """Qwen3-30B-A3B: 128 experts of 768 in each of 48 layers, of which a token meets 8."""
    one = shape("qwen3-30b-a3b")
    attention = 48 * (2 * 2048 * 32 * 128 + 2 * 2048 * 4 * 128)
    assert one.all_experts == 48 * 128 * 3 * 2048 * 768
    assert one.linear == attention + one.all_experts
    assert one.met == attention + 48 * 8 * 3 * 2048 * 768
    assert one.other == 48 * (2 * 2048 + 2 * 128 + 128 * 2048) + 2048
    # A of r x input and B of output x r for each expert; PEFT has them in two matrices.
    of_experts = 48 * 128 * 16 * ((2048 + 2 * 768) + (768 + 2048))
    plain = Lora(r=16)
    adapted = plain.model_copy(update={"target_parameters": EXPERTS})
    assert one.adapter(adapted) - one.adapter(plain) == of_experts


def test_the_guides_adapter() -> None:
    assert shape("llama-3.2-1b").adapter(Lora()) == 3_407_872


def test_linear_layers_embeddings_and_the_rest_are_everything() -> None:
    one = shape("qwen2.5-7b")
    assert one.embedding == 2 * 152_064 * 3584
    assert one.linear + one.embedding + one.other == one.parameters


def test_an_unheard_of_model_is_read_by_the_standard_keys() -> None:
    strange = {**config("llama-3.1-8b"), "model_type": "unheard_of"}
    found = Shape.from_config(strange)
    assert found is not None
    assert found.parameters == PARAMETERS["llama-3.1-8b"]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="empty"),
        pytest.param(config("gpt2"), id="no standard keys"),
        pytest.param({**config("qwen3-30b-a3b"), "model_type": "new_moe"}, id="another mixture"),
        pytest.param({**config("qwen3-30b-a3b"), "mlp_only_layers": [0]}, id="a dense layer"),
        pytest.param({**config("qwen3-30b-a3b"), "decoder_sparse_step": 2}, id="dense layers"),
        pytest.param({**config("llama-3.1-8b"), "hidden_size": "wide"}, id="no number"),
        pytest.param({**config("llama-3.1-8b"), "hidden_size": 0}, id="no width"),
        pytest.param({**config("llama-3.1-8b"), "num_attention_heads": 0}, id="no heads"),
        pytest.param({**config("llama-3.1-8b"), "intermediate_size": [1, 2]}, id="a list"),
    ],
)
def test_a_model_that_is_not_covered_has_no_shape(settings: dict[str, Any]) -> None:
    assert Shape.from_config(settings) is None
