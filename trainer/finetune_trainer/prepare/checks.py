"""Whether the base model's chat template, layers and tokenizer can do what the spec asks for."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import (
    UNQUANTIZED,
    ChatTemplate,
    Example,
    Export,
    Lora,
    Quantization,
    Reason,
    RunConfig,
    StageError,
    display_name,
)
from finetune_trainer.contract.output import NEED_IMPORTANCE
from finetune_trainer.model import ModelFolder, converter, initial_adapter
from finetune_trainer.model.adapter import (
    Layers,
    outline_adapter,
    resolve_targets,
    told_by_files,
)
from finetune_trainer.model.base_model import BaseModelFiles
from finetune_trainer.model.prequantized import needs_whole, outline
from finetune_trainer.model.rendering import render, render_example
from finetune_trainer.model.shape import Shape, vocabulary_size
from finetune_trainer.model.tokenizer import (
    end_of_turn_ids,
    is_plain_template,
    load_tokenizer,
    model_probes,
    other_tokens,
    rows_read_otherwise,
)
from finetune_trainer.runtime.reporter import Reporter

BLOCK = 32  # values that each quantized block has at least (Q8_0)
K_BLOCK = 256  # of all types below Q8_0; llama.cpp takes a larger type where rows don't divide

_MARK = "\N{SNOWMAN}"  # in no template
_SYSTEM_REMEDY = (
    "Leave spec.dataset.systemPrompt and the rows' system prompts out and put that text into the "
    "instructions, or choose a base model that knows system prompts."
)

log = logging.getLogger(__name__)


def check_template(tokenizer: PreTrainedTokenizerBase, *, system: bool) -> None:
    """Raise StageError(ModelUnsupported) when the template fails on a question and an answer, or
    does not end the answer with a special token.

    With `system`, raise StageError(InvalidConfig) when it takes no system prompt.
    """
    try:
        ends = end_of_turn_ids(tokenizer)
    except StageError:
        raise
    except Exception as error:  # the model's own template runs: anything can come out
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


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, base: ModelFolder) -> None:
    """Raise StageError(ModelUnsupported) for tokens that the model's embedding has no row for."""
    size = vocabulary_size(base.path)
    tokens = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    if size is None or (extra := [each for each in tokens if each[0] >= size]) == []:
        return
    (first, token), (last, _) = extra[0], extra[-1]
    raise StageError(
        Reason.MODEL_UNSUPPORTED,
        f"The base model's tokenizer has {len(extra)} tokens that the model has no embedding for, "
        f"such as {token!r} ({first}; vocab_size in config.json is {size}). Take the tokenizer "
        f"that came with the model; or, to teach it new tokens, grow the model once by "
        f"transformers' resize_token_embeddings({last + 1}), save both into a folder, and train "
        "it with spec.training.lora.modulesToSave: [embed_tokens].",
    )


def describe_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    text = str(tokenizer.get_chat_template())
    return ChatTemplate(
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        fallback=is_plain_template(tokenizer),
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
    except StageError:
        raise
    except Exception as error:  # as above
        raise StageError(
            Reason.INVALID_CONFIG,
            f"The base model's chat template takes no system prompt ({error}). {_SYSTEM_REMEDY}",
        ) from error
    if not kept:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"The base model's chat template leaves system prompts out. {_SYSTEM_REMEDY}",
        )


def check_model(
    config: RunConfig,
    model: BaseModelFiles,
    base: ModelFolder,
    workdir: Path,
    reporter: Reporter,
    *,
    rows: Mapping[str, Example] | None = None,
) -> str:
    """Look at tensors, architecture and tokenizer; returns what is worth knowing of the rows.

    `base` has the model's small files. llama.cpp must split texts that are hard to split as the
    tokenizer does, unless spec.export.verify is off. `rows`, by what people call them, are compared
    as well, but refuse nothing. Raises StageError: InvalidConfig where the model lacks a target
    module, ModelUnsupported where llama.cpp can't do what spec.export.gguf asks for.
    """
    headers = converter.read_headers(model, config.model_storage)
    if needs_whole(config.export):
        base, headers = outline(base, headers, workdir / "in-16-bits")
    if config.export.merged_fp8:
        check_experts(headers)
    if config.training.method != "full":
        check_targets(config.training.lora, base, converter.tensor_names(headers))
        initial_adapter.check(config, base, model.revision)
    if not config.export.gguf:
        return ""
    reporter.message("Checking that llama.cpp can convert the model")
    check_widths(config.export, Shape.of_model(base.path))
    check_few_bits(config.export, headers)
    tokenizer = load_tokenizer(base)
    probes, texts = model_probes(tokenizer), _rendered(tokenizer, rows or {})
    theirs = converter.rehearse(
        converter.with_stand_ins(model, headers, base, workdir / "rehearsal"),
        display_name(config.model.source),
        workdir / "rehearsal.gguf",
        [*probes, *texts.values()],
    )
    if config.export.verify == "off":
        return ""
    ours = tokenizer([*probes, *texts.values()], add_special_tokens=False)["input_ids"]
    check_tokens(probes, ours[: len(probes)], theirs[: len(probes)])
    pairs = zip(texts, ours[len(probes) :], theirs[len(probes) :], strict=True)
    others = [name for name, mine, other in pairs if mine != other]
    return rows_read_otherwise(others, [texts[name] for name in others])


def _rendered(tokenizer: PreTrainedTokenizerBase, rows: Mapping[str, Example]) -> dict[str, str]:
    found = {}
    for name, row in rows.items():
        try:
            found[name] = render_example(tokenizer, row)
        except StageError:
            raise
        except Exception as error:
            # A row that the template refuses is a bad row, which shows when all are encoded.
            log.debug("The template refuses a row: %s", error)
    return found


def check_tokens(
    texts: Sequence[str], ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]
) -> None:
    """Raise StageError(ModelUnsupported) when llama.cpp splits a text otherwise."""
    if different := other_tokens(texts, ours, theirs):
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            f"{different}, so its GGUF files would answer worse. Choose another base model, leave "
            "spec.export.gguf empty to get the adapter and the merged model only, or set "
            "spec.export.verify to off to get the files all the same.",
        )


def check_experts(headers: converter.Headers) -> None:
    """Raise StageError(ModelUnsupported) for experts in one tensor: in FP8 nobody reads them."""
    for name, tensor in (item for header in headers.values() for item in header.items()):
        if ".experts." in name and len(tensor.shape) > 2:
            raise StageError(
                Reason.MODEL_UNSUPPORTED,
                f"The model stacks its experts in one tensor ({name}), which servers read in FP8 "
                "only one by one: set spec.export.mergedFp8 to false.",
            )


def check_few_bits(export: Export, headers: converter.Headers) -> None:
    """Raise StageError(ModelUnsupported) for types that need an importance matrix, with experts."""
    asked = [kind for kind in export.gguf if kind in NEED_IMPORTANCE]
    if asked and any(".experts." in name for header in headers.values() for name in header):
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            f"llama.cpp writes {', '.join(asked)} only with an importance matrix of every layer, "
            "and there is none of experts: leave these types out of spec.export.gguf.",
        )


def check_targets(lora: Lora, base: ModelFolder, tensors: list[str]) -> None:
    """Raise StageError(InvalidConfig) when the model has none of the layers of a target module.

    Where the names of its tensors can't tell, the model is built, without weights.
    """
    if told_by_files(lora, tensors):
        resolve_targets(lora, Layers.of_tensors(tensors))
    else:
        outline_adapter(base, lora)


def check_widths(export: Export, shape: Shape | None) -> None:
    """Raise StageError(ModelUnsupported) when llama.cpp would not quantize the layers."""
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
