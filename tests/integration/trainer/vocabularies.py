"""Tokenizers of the families' kinds: parts of byte-level BPE vocabularies with their published ids
(tests/data/tokenizers), and SentencePiece models that are trained here on a few lines."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as spm
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from tests.integration.trainer.conftest import ROWS

DATA = Path(__file__).parents[2] / "data"


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

FLAGS = {"lstrip": False, "normalized": False, "single_word": False}


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
