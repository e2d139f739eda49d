"""The guide's numbers: a rank-16 adapter on Llama-3.2-1B."""

from __future__ import annotations

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_trainer.contract import Lora
from finetune_trainer.model.adapter import lora_config
from finetune_trainer.train.recipe.lora import count_trainable_parameters

LLAMA_3_2_1B = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
)


def test_the_default_adapter_of_llama_3_2_1b() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LLAMA_3_2_1B)  # type: ignore[no-untyped-call] # transformers
        base = model.num_parameters()
        tuned = get_peft_model(model, lora_config(Lora(), model))
    assert base == 1_235_814_400
    assert count_trainable_parameters(tuned) == 3_407_872
