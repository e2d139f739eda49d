"""A GGUF file reads text as the training did: the same tokens, the same template, the same end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune_trainer.export.gguf.header import Header
from finetune_trainer.export.reference.rows import Rows
from finetune_trainer.model.tokenizer import HARD_TO_SPLIT, begins_with_bos, end_of_turn_ids

_NORMAL = 1  # tokenizer.ggml.token_type of an ordinary token


@dataclass(frozen=True)
class Wanted:
    """What the training used."""

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    template: str
    ends: tuple[int, ...]
    """The special tokens that the template puts behind an answer."""

    eos: tuple[int, ...]
    """What the metadata may name as the end of a sequence."""

    begins_with_bos: bool


def wanted(tokenizer: PreTrainedTokenizerBase, rows: Rows) -> Wanted:
    """Whole conversations as they were trained, and texts that are hard to split."""
    probes = tokenizer(list(HARD_TO_SPLIT), add_special_tokens=False)["input_ids"]
    ends = tuple(sorted(end_of_turn_ids(tokenizer)))
    return Wanted(
        texts=rows.texts + HARD_TO_SPLIT,
        ids=rows.full_ids + tuple(tuple(ids) for ids in probes),
        template=str(tokenizer.get_chat_template()).strip(),
        ends=ends,
        eos=(*ends, int(tokenizer.eos_token_id)),
        begins_with_bos=begins_with_bos(tokenizer),
    )


def problems_of(said: dict[str, Any], header: Header, training: Wanted) -> Iterator[str]:
    """Where llama.cpp, and the metadata that others go by, differ from the training."""
    yield from _other_tokens(said["tokens"], training)
    template = header.value("tokenizer.chat_template")
    if str(template or "").strip() != training.template:
        yield "its chat template is not the one that the training used"
    if not said["stopsAt"]:
        yield f"llama.cpp would not stop at the token that ends an answer ({list(training.ends)})"
    eos = header.value("tokenizer.ggml.eos_token_id")
    if eos not in training.eos:
        yield f"its metadata names {eos} as the end of a text, and not one of {training.eos}"
    if said["addsBos"] and not training.begins_with_bos:
        yield "servers would put a token before each prompt that the training did not (add_bos)"
    if said["addsEos"]:
        yield "servers would put an end token behind each prompt (add_eos)"


def other_vocabulary(header: Header, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Ordinary tokens and merges that are not the tokenizer's, whether the rows use them or not."""
    texts = header.strings("tokenizer.ggml.tokens") or []
    types = header.numbers("tokenizer.ggml.token_type") or []
    normal = [index for index, kind in enumerate(types[: len(texts)]) if kind == _NORMAL]
    known = tokenizer.convert_ids_to_tokens(normal)
    other = [i for i, token in zip(normal, known, strict=True) if texts[i] != token]
    if other:
        yield f"{len(other)} entries of its vocabulary are not the tokenizer's, such as {other[0]}"
    merges = header.strings("tokenizer.ggml.merges")
    trained = _merges(tokenizer)
    if merges and trained and merges != trained:
        yield "its merges of the vocabulary are not the tokenizer's"


def _merges(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The merges of byte-pair encoding in their order, as GGUF writes them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend else {}
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", ())]
    # A space within a token would look like the one between the two (gguf-py's SpecialVocab).
    return [" ".join(part.replace(" ", chr(ord(" ") + 256)) for part in pair) for pair in pairs]


def _other_tokens(found: Sequence[Sequence[int]], training: Wanted) -> Iterator[str]:
    pairs = zip(training.texts, training.ids, found, strict=True)
    other = [(text, ours, theirs) for text, ours, theirs in pairs if list(ours) != list(theirs)]
    if other:
        text, ours, theirs = other[0]
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
            min(len(ours), len(theirs)),
        )
        yield (
            f"llama.cpp splits {len(other)} of {len(training.texts)} texts into other tokens than "
            f"the training did ({list(theirs[at : at + 8])} instead of {list(ours[at : at + 8])} "
            f"in {text[:60]!r})"
        )
