"""Tiny models of the families that people fine-tune, as their publishers' folders look.

Weights are random, also norms and biases, so that each of them counts. Chat templates and kinds of
tokenizers are the families' own: parts of byte-level BPE vocabularies with their published ids
(tests/data/tokenizers), and SentencePiece models that are trained here on a few lines.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2 as spm
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig

from tests.integration.trainer.architectures import in_dtype, random_model
from tests.integration.trainer.conftest import ROWS

DATA = Path(__file__).parents[2] / "data"
SMALL: dict[str, Any] = {
    # Large vocabularies, narrow layers.
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
WIDE: dict[str, Any] = {
    # Wide enough for K-quants, whose blocks have 256 values.
    **SMALL,
    "hidden_size": 256,
    "intermediate_size": 256,
    "initializer_range": 0.1,
}
MIXED = {"layer_types": ["sliding_attention"] * 5 + ["full_attention"], "num_hidden_layers": 6}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer of a family's kind."""

    rows: int
    """Of the embeddings; published models have more than their tokenizer needs."""

    special: dict[str, int]
    """Special tokens with their ids."""

    settings: dict[str, Any]
    """tokenizer_config.json."""

    part: str | None = None
    """File in tests/data/tokenizers; without one it is a SentencePiece model."""

    strips: tuple[str, ...] = ()
    """Special tokens that swallow the white space behind them."""

    gemma: bool = False
    """Whether it is SentencePiece as Gemma has it: no space is put before a text."""


@dataclass(frozen=True)
class Family:
    """A family's architecture and the files that surround it."""

    kind: str
    """model_type."""

    vocabulary: Vocabulary
    template: str
    """The chat template: a file in tests/data/chat_templates, or its text."""

    shape: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] | None = None
    """Of the tower that reads images, which this project leaves as it is."""


CHATML = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
SMOLLM2 = Vocabulary(
    49_152,
    CHATML,
    {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    },
    "smollm2",
)
LLAMA3 = Vocabulary(
    # Not Meta's vocabulary, whose licence would have to come with it.
    49_160,
    {
        "<|begin_of_text|>": 49_152,
        "<|end_of_text|>": 49_153,
        "<|start_header_id|>": 49_154,
        "<|end_header_id|>": 49_155,
        "<|eot_id|>": 49_156,
    },
    {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
    },
    "smollm2",
)
QWEN = Vocabulary(
    151_680,
    {"<|endoftext|>": 151_643, "<|im_start|>": 151_644, "<|im_end|>": 151_645},
    {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
    },
    "qwen2",
)
PHI4 = Vocabulary(
    100_352,
    {
        "<|endoftext|>": 100_257,
        "<|im_start|>": 100_264,
        "<|im_end|>": 100_265,
        "<|im_sep|>": 100_266,
    },
    {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    },
    "phi4",
)
GEMMA = Vocabulary(
    512,
    {
        "<pad>": 0,
        "<eos>": 1,
        "<bos>": 2,
        "<unk>": 3,
        "<start_of_turn>": 4,
        "<end_of_turn>": 5,
    },
    {
        "tokenizer_class": "GemmaTokenizer",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "add_bos_token": True,
    },
    gemma=True,
)
MISTRAL = Vocabulary(
    512,
    {"<unk>": 0, "<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4},
    {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "legacy": False,
    },
)
PHI3 = Vocabulary(
    512,
    {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        "<|endoftext|>": 500,
        "<|assistant|>": 501,
        "<|system|>": 502,
        "<|end|>": 503,
        "<|user|>": 504,
    },
    {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "add_bos_token": False,
        "legacy": False,
    },
    strips=("</s>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
)
PHI4_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '<|im_sep|>'"
    " + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)

EACH_CHANGE = ("llama-3.2", "gemma-3", "phi-4")
"""Families that every run of the tests takes through the whole pipeline: with a plain vocabulary,
with SentencePiece's, and with fused layers. A release takes all."""

FAMILIES: dict[str, Family] = {
    "llama-3": Family("llama", LLAMA3, "llama3", {**SMALL, "tie_word_embeddings": False}),
    "llama-3.2": Family(
        "llama",
        LLAMA3,
        "llama3",
        {
            **SMALL,
            "head_dim": 32,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "qwen2.5": Family("qwen2", QWEN, "chatml", {**SMALL, "tie_word_embeddings": True}),
    "qwen3": Family(
        "qwen3", QWEN, "chatml", {**SMALL, "head_dim": 32, "tie_word_embeddings": False}
    ),
    "gemma-2": Family(
        "gemma2",
        GEMMA,
        "gemma",
        {
            **WIDE,
            "head_dim": 64,
            "query_pre_attn_scalar": 64,
            "sliding_window": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma-3": Family(
        "gemma3_text",
        GEMMA,
        "gemma",
        {**WIDE, **MIXED, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 8},
    ),
    "gemma-3-vision": Family(
        "gemma3",
        GEMMA,
        "gemma",
        {**WIDE, **MIXED, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 8},
        vision={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    ),
    "mistral": Family("mistral", MISTRAL, "mistral", {**WIDE, "sliding_window": None}),
    "phi-3": Family("phi3", PHI3, "phi3", {**WIDE, "sliding_window": 511}),
    "phi-4": Family("phi3", PHI4, PHI4_TEMPLATE, {**SMALL, "sliding_window": None}),
    "smollm2": Family("llama", SMOLLM2, "chatml", {**SMALL, "tie_word_embeddings": True}),
    "smollm3": Family(
        "smollm3",
        SMOLLM2,
        "chatml",
        {**SMALL, "num_hidden_layers": 4, "tie_word_embeddings": True},
    ),
}


def write_family(family: Family, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A base model's folder: configuration, weights, tokenizer and template; always the same."""
    torch.manual_seed(0)
    model = random_model(configuration(family))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases, which begin as ones and zeros
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    in_dtype(model, dtype).save_pretrained(folder)
    write_tokenizer(family, folder)
    return folder


def configuration(family: Family) -> Any:
    """config.json."""
    vocabulary, ids = family.vocabulary, family.vocabulary.special
    named = {
        f"{name}_token_id": ids[vocabulary.settings[f"{name}_token"]]
        for name in ("bos", "eos", "pad")
        if f"{name}_token" in vocabulary.settings
    }
    defaults = {"bos_token_id": None, "pad_token_id": None}
    text = {"vocab_size": vocabulary.rows, **defaults, **named, **family.shape}
    if family.vision is None:
        return AutoConfig.for_model(family.kind, **text)
    return AutoConfig.for_model(
        family.kind, text_config=text, vision_config=family.vision, mm_tokens_per_image=4, **named
    )


def write_tokenizer(family: Family, folder: Path) -> None:
    """tokenizer.json, its configuration, and the SentencePiece model where there is one."""
    vocabulary = family.vocabulary
    folder.mkdir(parents=True, exist_ok=True)
    if vocabulary.part:
        tokenizer = Tokenizer.from_file(str(DATA / "tokenizers" / f"{vocabulary.part}.json"))
    else:
        pieces = sentencepiece_of(vocabulary)
        (folder / "tokenizer.model").write_bytes(pieces)
        tokenizer = fast(pieces, vocabulary)
    add_special(tokenizer, vocabulary)
    tokenizer.save(str(folder / "tokenizer.json"))
    file = DATA / "chat_templates" / f"{family.template}.jinja"
    template = family.template if "{" in family.template else file.read_text(encoding="utf-8")
    added = {
        str(number): {
            **_FLAGS,
            "content": token,
            "special": True,
            "rstrip": token in vocabulary.strips,
        }
        for token, number in vocabulary.special.items()
    }
    settings = {
        **vocabulary.settings,
        "added_tokens_decoder": added,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


_FLAGS = {"lstrip": False, "normalized": False, "single_word": False}


def add_special(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Give special tokens their ids, which leave gaps, and put the first one before each text."""
    written = json.loads(tokenizer.to_str())
    written["model"]["vocab"] |= vocabulary.special
    whole = Tokenizer.from_str(json.dumps(written))
    whole.add_special_tokens(
        [
            AddedToken(token, special=True, rstrip=token in vocabulary.strips)
            for token in vocabulary.special
        ]
    )
    if vocabulary.settings.get("add_bos_token"):
        bos = vocabulary.settings["bos_token"]
        whole.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, vocabulary.special[bos])],
        )
    tokenizer.__setstate__(whole.to_str().encode())


@cache
def trained_pieces(specials: tuple[str, ...], gemma: bool) -> bytes:
    """A SentencePiece BPE model of the tests' rows, with bytes for all else."""
    model = io.BytesIO()
    first = ("<pad>", "<eos>", "<bos>", "<unk>") if gemma else ("<unk>", "<s>", "</s>")
    numbers = {name: first.index(name) if name in first else -1 for name in _SPECIAL_NAMES[gemma]}
    pad, eos, bos, unk = (numbers.get(name, -1) for name in _SPECIAL_NAMES[gemma])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for row in ROWS for text in row] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=not gemma,
        control_symbols=[token for token in specials if token not in first],
        pad_id=pad,
        eos_id=eos,
        bos_id=bos,
        unk_id=unk,
        pad_piece="<pad>",
        eos_piece="<eos>" if gemma else "</s>",
        bos_piece="<bos>" if gemma else "<s>",
        minloglevel=2,
    )
    return model.getvalue()


_SPECIAL_NAMES = {
    True: ("<pad>", "<eos>", "<bos>", "<unk>"),
    False: ("<pad>", "</s>", "<s>", "<unk>"),
}


def sentencepiece_of(vocabulary: Vocabulary) -> bytes:
    """The model with those special tokens that come first; later ones are added beside it."""
    inside = tuple(token for token, number in vocabulary.special.items() if number < 100)
    return trained_pieces(inside, vocabulary.gemma)


def fast(pieces: bytes, vocabulary: Vocabulary) -> Tokenizer:
    """tokenizer.json of a SentencePiece model, as the families' publishers converted theirs."""
    model = spm.ModelProto()  # type: ignore[attr-defined] # protobuf makes it at import
    model.ParseFromString(pieces)
    ids = {piece.piece: number for number, piece in enumerate(model.pieces)}
    tokenizer = Tokenizer(
        models.BPE(ids, merges(ids), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    replace = normalizers.Replace(" ", "▁")
    if vocabulary.gemma:
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [] if vocabulary.gemma else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence([*steps, *strip])
    return tokenizer


def merges(ids: dict[str, int]) -> Sequence[tuple[str, str]]:
    """All ways to make a piece of two others, in the order of the pieces."""
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(ids, key=lambda each: ids[each])
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
