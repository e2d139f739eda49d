"""Models with random weights, a tokenizer of single bytes, and rows of a wanted length."""

from __future__ import annotations

import json
import math
import random
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finetune_trainer.contract import Example
from finetune_trainer.model.tokenizer import message_pair

PAD, START, END = "<pad>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION = "Go on."
AROUND = 27
"""Tokens of a row beside its answer: the template's and the question's."""

_COMMON: dict[str, Any] = {
    "vocab_size": 128_256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    # As in the config.json of Llama 3.2 1B and Llama 3.1 8B.
    "1b": _COMMON
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8b": _COMMON
    | {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
SHAPES["wide"] = SHAPES["1b"]  # for memory that runs out; in the tiny form of more words
_TINY = {
    "vocab_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "head_dim": 16,
}


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    tiny: bool
    longest: int
    """Tokens of the longest row."""

    ladder_row: int
    """Tokens of a row where memory has to run out."""

    step_rows: int
    """Rows of an optimizer step where speed is measured."""

    check_steps: int
    """Optimizer steps of a training that is compared with another."""

    measured_seconds: float
    """How long a training is timed, after its first steps."""

    @classmethod
    def full(cls) -> Scale:
        return cls(
            tiny=False,
            longest=2048,
            ladder_row=2048,
            step_rows=32,
            check_steps=6,
            measured_seconds=20,
        )

    @classmethod
    def smallest(cls) -> Scale:
        """For a CPU, to run every line once."""
        return cls(
            tiny=True, longest=48, ladder_row=1024, step_rows=4, check_steps=4, measured_seconds=0
        )


def config_of(name: str, scale: Scale) -> LlamaConfig:
    """Of the model `1b` or `8b`; in the tiny form they differ in the output layer alone."""
    settings = SHAPES[name] | (_TINY if scale.tiny else {})
    if scale.tiny and name == "wide":
        settings["vocab_size"] = 4096
    return LlamaConfig(**settings, dtype="bfloat16")


def make_model(name: str, scale: Scale, folder: Path) -> Path:
    """A folder as a download would leave it; made once."""
    target = folder / name
    if name == "wide" and not scale.tiny:
        return make_model("1b", scale, folder)
    if (target / "config.json").exists():
        return target
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = LlamaForCausalLM(config_of(name, scale))  # type: ignore[no-untyped-call]
    finally:
        torch.set_default_dtype(before)
    partial = folder / f"{name}.partial"
    model.save_pretrained(partial)
    make_tokenizer().save_pretrained(partial)
    partial.rename(target)
    return target


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and those that the template writes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [PAD, START, END]
    vocabulary = {text: number for number, text in enumerate([*special, *letters])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        chat_template=TEMPLATE,
    )


def row(tokens: int, seed: int) -> Example:
    """Of so many tokens, nearly all of them answer: letters at random."""
    dice = random.Random(seed)  # noqa: S311 - no secret
    answer = "".join(dice.choices(string.ascii_lowercase, k=max(tokens - AROUND, 1)))
    return message_pair(QUESTION, answer)


def even_lengths(count: int, longest: int) -> list[int]:
    """Between two thirds of the longest and the longest, so that no two are as long as it."""
    low = longest * 2 // 3
    return [longest - (longest - low) * index // max(count - 1, 1) for index in range(count)]


def mixed_lengths(count: int, longest: int) -> list[int]:
    """As instruction data has them: most are short and few very long.

    Quantiles of a lognormal distribution (median 1/16 of the longest, sigma 1.2), shuffled.
    """
    normal = [_normal_quantile((index + 0.5) / count) for index in range(count)]
    found = [min(max(round(longest / 16 * math.exp(1.2 * z)), AROUND + 8), longest) for z in normal]
    found[-1] = longest
    random.Random(1).shuffle(found)  # noqa: S311 - no secret
    return found


def _normal_quantile(share: float) -> float:
    from statistics import NormalDist  # noqa: PLC0415 - beside its only use

    return NormalDist().inv_cdf(share)


def write_rows(file: Path, rows: list[Example]) -> Path:
    """As `prepare` leaves them."""
    file.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return file
