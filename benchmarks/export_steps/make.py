"""A base model and an adapter, random."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from examples.base_model import smollm2

SHAPES = {
    # Width, inner width and layers, by billions of parameters. Of the first, the vocabulary is
    # SmolLM2's; the others have Llama 3's, whose embedding and output layer are the largest tensors
    # by far.
    "1.07": (2048, 8192, 16),
    "0.1": (256, 1024, 8),
    "0.3": (768, 2048, 16),
    "1": (2048, 5632, 10),
    "2": (3072, 8192, 11),
    "7": (4096, 11008, 34),
}
LARGE_VOCABULARY = 128_256


def make(folder: str, shape: str) -> None:
    """A Llama with random weights in bfloat16, and a LoRA adapter (r 16 on q, k, v and o)."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    small = shape == "1.07"
    width, inner, layers = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=len(tokenizer) if small else LARGE_VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        tie_word_embeddings=small,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)  # type: ignore[no-untyped-call] # transformers has no type
    print(f"{model.num_parameters():,} parameters")
    base, adapter = Path(folder) / "base", Path(folder) / "adapter"
    model.save_pretrained(base)
    targets = [f"{name}_proj" for name in "qkvo"]
    tuned = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    tuned.save_pretrained(str(adapter))
    for each in (base, adapter):
        tokenizer.save_pretrained(each)


if __name__ == "__main__":
    make(*sys.argv[1:])
