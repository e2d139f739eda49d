"""Whether the base model can be trained and exported as asked, without its weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from finetune_trainer.base_model import rehearsal
from finetune_trainer.base_model.probes import PROBES
from finetune_trainer.base_model.source import ModelFiles, display_name
from finetune_trainer.base_model.targets import resolve_targets
from finetune_trainer.base_model.tokenizer import load_tokenizer, render
from finetune_trainer.config import UNQUANTIZED, Export, Lora, Message, Quantization, RunConfig
from finetune_trainer.memory.shape import Shape
from finetune_trainer.outcome import Reason, StageError
from finetune_trainer.progress import Reporter

BLOCK = 32  # values that each quantized block has at least (Q8_0)
K_BLOCK = 256  # of all types below Q8_0; llama.cpp takes a larger type where rows don't divide

log = logging.getLogger(__name__)


def check_model(
    config: RunConfig,
    model: ModelFiles,
    base: Path,
    workspace: Path,
    reporter: Reporter,
    *,
    rows: Iterable[Sequence[Message]] = (),
) -> None:
    """Look at tensors, architecture and tokenizer.

    `base` has the model's small files; `rows` are conversations that llama.cpp must read as the
    training does, beside texts that are hard to split. Raises StageError: InvalidConfig where the
    model lacks a target module, ModelUnsupported where llama.cpp can't do what spec.export.gguf
    asks for.
    """
    headers = rehearsal.read_headers(model, config.storage)
    check_targets(config.training.lora, rehearsal.tensor_names(headers))
    if not config.export.gguf:
        return
    reporter.message("Checking that llama.cpp can convert the model")
    check_widths(config.export, Shape.from_config(json.loads((base / "config.json").read_bytes())))
    tokenizer = load_tokenizer(base, trust_remote_code=config.model.trust_remote_code)
    texts = [*rendered(tokenizer, rows), *PROBES]
    found = rehearsal.rehearse(
        rehearsal.with_stand_ins(model, headers, base, workspace / "rehearsal"),
        display_name(config.model.source),
        workspace / "rehearsal.gguf",
        texts,
        trust_remote_code=config.model.trust_remote_code,
    )
    check_tokens(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], found)


def rendered(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[Sequence[Message]]
) -> Iterator[str]:
    """Conversations as text, without those that the template refuses: they are found later."""
    for row in rows:
        with suppress(Exception):  # the model's own template runs: anything can come out
            yield render(tokenizer, row)


def check_tokens(texts: list[str], ours: list[list[int]], theirs: list[list[int]]) -> None:
    """Raise StageError(ModelUnsupported) when llama.cpp splits a text otherwise."""
    other = [n for n, (one, two) in enumerate(zip(ours, theirs, strict=True)) if one != two]
    if not other:
        return
    text, one, two = texts[other[0]], ours[other[0]], theirs[other[0]]
    at = next((n for n, pair in enumerate(zip(one, two, strict=False)) if len({*pair}) > 1), 0)
    raise StageError(
        Reason.MODEL_UNSUPPORTED,
        f"llama.cpp splits {len(other)} of {len(texts)} texts into other tokens than the training "
        f"would, so its GGUF files would answer worse: {two[at : at + 8]} instead of "
        f"{one[at : at + 8]} in {text[:100]!r}. Choose another base model, or leave "
        "spec.export.gguf empty to get the adapter and the merged model only.",
    )


def check_targets(lora: Lora, tensors: list[str]) -> None:
    """Raise StageError(InvalidConfig) when the model has none of the layers of a target module."""
    suffix = ".weight"
    layers = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    resolve_targets(lora.target_modules, layers)


def check_widths(export: Export, shape: Shape | None) -> None:
    """Raise StageError(ModelUnsupported) when llama.cpp would leave the layers as they are."""
    quantized = [kind for kind in export.gguf if kind not in UNQUANTIZED]
    if shape is None or not quantized:
        return
    if shape.hidden % BLOCK:
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            f"llama.cpp can't quantize this model to {', '.join(quantized)}: its hidden size "
            f"{shape.hidden} is no multiple of {BLOCK}, so that the layers would stay in 16 bits. "
            "Leave only F32, F16 or BF16 in spec.export.gguf.",
        )
    small = [kind for kind in quantized if kind is not Quantization.Q8_0]
    if small and shape.hidden % K_BLOCK:
        log.warning(
            "The hidden size %d is no multiple of %d: llama.cpp holds most layers of %s in larger "
            "types than these names say",
            shape.hidden,
            K_BLOCK,
            ", ".join(small),
        )
