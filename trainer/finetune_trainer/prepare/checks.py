"""Whether the base model can be trained and exported as asked, and how it fits the hardware."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import (
    UNQUANTIZED,
    ChatTemplate,
    Export,
    Lora,
    Message,
    Quantization,
    Reason,
    RunConfig,
    StageError,
    TrainingPlan,
)
from finetune_trainer.memory.disk import check_disk, downloaded, training_disk
from finetune_trainer.memory.plan import Lengths, describe, plan
from finetune_trainer.model import rehearsal
from finetune_trainer.model.shape import Shape
from finetune_trainer.model.source import ModelFiles, display_name
from finetune_trainer.model.targets import resolve_targets
from finetune_trainer.model.tokenizer import (
    BEGIN,
    PLAIN_TEMPLATE,
    PROBES,
    end_of_turn_ids,
    load_tokenizer,
    render,
)
from finetune_trainer.runtime.progress import Reporter

_MARK = "\N{SNOWMAN}"  # in no template
_REMEDY = (
    "Leave spec.dataset.systemPrompt and the rows' system prompts out and put that text into the "
    "instructions, or choose a base model that knows system prompts."
)


def check_template(tokenizer: PreTrainedTokenizerBase, *, system: bool) -> None:
    """Raises StageError(ModelUnsupported) when the template fails on a question and an answer or
    does not end the answer with a special token, and StageError(InvalidConfig) when `system` is
    asked for and it takes no system prompt."""
    try:
        ends = end_of_turn_ids(tokenizer)
    except Exception as error:  # Jinja runs the model's own template: anything can come out
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            f"The base model's chat template fails on a user's question and an answer: {error} "
            "Correct chat_template in tokenizer_config.json or chat_template.jinja.",
        ) from error
    if not ends:
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            "The base model's chat template puts no special token behind an answer, so a tuned "
            "model would never stop: let the template end it with the eos_token.",
        )
    if system:
        _check_system(tokenizer)


def describe_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The template for dataset-report.json."""
    text = str(tokenizer.get_chat_template())
    return ChatTemplate(
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        fallback=text.removeprefix(BEGIN) == PLAIN_TEMPLATE,
    )


def _check_system(tokenizer: PreTrainedTokenizerBase) -> None:
    """A template may refuse system prompts (Gemma's did), or drop them without a word."""
    messages = [
        {"role": "system", "content": _MARK},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    try:
        kept = _MARK in render(tokenizer, messages)
    except Exception as error:  # as above
        raise StageError(
            Reason.INVALID_CONFIG,
            f"The base model's chat template takes no system prompt ({error}). {_REMEDY}",
        ) from error
    if not kept:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"The base model's chat template leaves system prompts out. {_REMEDY}",
        )


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


def plan_training(
    config: RunConfig, model: ModelFiles, folder: Path, longest: int
) -> TrainingPlan | None:
    """How to split a step; None where nothing is known of the hardware or of the model's widths.

    `folder` has the model's config.json; `longest` is the tokens of the longest example, as it is
    trained on. Raises StageError: OutOfGPUMemory, OutOfMemory, OutOfDisk, InvalidConfig.
    """
    if config.hardware is None:
        return None
    shape = Shape.from_config(json.loads((folder / "config.json").read_bytes()))
    if shape is None:
        log.warning(
            "The widths of %s can't be read from its config.json, so its memory is not predicted",
            config.model.source,
        )
        return None
    check_training_disk(config, model, shape)
    made = plan(config.training, shape, Lengths(longest), config.hardware)
    log.info("Plan: %s", describe(made, config.hardware))
    return made


def check_training_disk(config: RunConfig, model: ModelFiles, shape: Shape) -> None:
    """Raise StageError(OutOfDisk) when the base model alone would fill the training's disk."""
    available = config.hardware.ephemeral_storage_bytes if config.hardware else None
    if available is None:
        return
    need = training_disk(shape, config.training.lora, downloaded(config.model.source, model.sizes))
    limit = "set stages.train.resources.limits.ephemeral-storage to"
    check_disk(need, available, "The training", limit)
