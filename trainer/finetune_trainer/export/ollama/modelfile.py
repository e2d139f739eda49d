"""Modelfile: what `ollama create` needs to serve the tuned model as it was trained.

The chat template is the one that was trained with, written as Ollama writes templates. It is left
out, with the reason in a comment, where it can't be written so that the same text comes out; Ollama
then guesses from the template in the GGUF file.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import Quantization, RunConfig
from finetune_trainer.export import llama
from finetune_trainer.export.gguf.files import MODELFILE, preferred
from finetune_trainer.export.ollama.template import (
    ChatShape,
    NoShapeError,
    find_shape,
    go_template,
    trials,
)
from finetune_trainer.model.tokenizer import end_of_turn_ids, render

CONTEXT = 4096  # tokens; Ollama's own default

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Template:
    """A template for Ollama, or why there is none."""

    text: str | None
    notes: tuple[str, ...]
    """For the comments above it."""


def write_modelfile(
    folder: Path,
    files: Mapping[Quantization, Path],
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    *,
    parameters: int,
    generation: Mapping[str, Any],
) -> Path:
    """Write `Modelfile` to `folder`, which the GGUF files are below.

    `parameters` is how many the model has, `generation` what its generation_config.json says.
    """
    file = files[preferred(files, parameters)]
    others = [other for other in files.values() if other != file]
    template = make_template(tokenizer, file)
    if template.text is None:
        log.warning("The Modelfile has no TEMPLATE: %s", " ".join(template.notes))
    lines = [
        f"# {config.model.source}, fine-tuned. Serve it with: ollama create NAME -f Modelfile",
        *(f"# Also here: ./{other.relative_to(folder)}" for other in others),
        f"FROM ./{file.relative_to(folder)}",
        *(f"# {note}" for note in template.notes),
        *([f'TEMPLATE """{template.text}"""'] if template.text is not None else []),
        *_system(config.dataset.system_prompt),
        *_parameters(tokenizer, generation, config.training.max_sequence_length),
    ]
    target = folder / MODELFILE
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def make_template(tokenizer: PreTrainedTokenizerBase, file: Path) -> Template:
    """The tokenizer's chat template for Ollama; `file` is a GGUF file, which is asked how it splits
    the same text."""
    reader = partial(render, tokenizer, prompt=True)
    try:
        shape = find_shape(reader)
        shape = without_bos(shape, tokenizer, file)
    except NoShapeError as error:
        notes = [
            f"No TEMPLATE: the model's chat template can't be written for Ollama, since {error}.",
            "Ollama takes the one in the GGUF file where it knows it; else write one here.",
        ]
        return Template(None, tuple(notes))
    notes = ["Written from the chat template that the model was trained with."]
    if shape.system == "refused":
        notes.append("It knows no system prompt: one is put before the first question.")
    if shape.system == "ignored":
        notes.append("It leaves system prompts out.")
    if shape.strips:
        notes.append("It removes blank space around what is said; Ollama leaves it.")
    return Template(go_template(shape), tuple(notes))


def without_bos(shape: ChatShape, tokenizer: PreTrainedTokenizerBase, file: Path) -> ChatShape:
    """The shape without the token that Ollama itself puts at the beginning.

    Raises NoShapeError when the file's tokens are not those of the training.
    """
    said = trials(system=shape.system in ("first", "last"))
    texts = [render(tokenizer, messages, prompt=True) for messages in said]
    adds = llama.call(do="tokenize", file=str(file), texts=[])["addsBos"]
    bos = str(tokenizer.bos_token or "")
    if adds and bos:
        shape = replace(
            shape,
            head=shape.head.removeprefix(bos),
            before_system=shape.before_system.removeprefix(bos),
        )
    served = [shape.render(messages) for messages in said]
    tokens = llama.call(do="tokenize", file=str(file), texts=served)["tokens"]
    trained = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if tokens != trained:
        raise NoShapeError("llama.cpp splits what it writes into other tokens than the training")
    return shape


def _system(prompt: str | None) -> list[str]:
    if not prompt:
        return []
    printable = all(c.isprintable() or c == "\n" for c in prompt)
    if not printable or '"""' in prompt or prompt.endswith('"'):
        return ["# The system prompt of the training can't be written here; pass it by the API."]
    return [f'SYSTEM """{prompt}"""']


def _parameters(
    tokenizer: PreTrainedTokenizerBase, generation: Mapping[str, Any], trained: int
) -> list[str]:
    ends = [str(tokenizer.decode([token])) for token in sorted(end_of_turn_ids(tokenizer))]
    found = [f'PARAMETER stop "{end}"' for end in ends]
    if trained > CONTEXT:
        found.append(f"PARAMETER num_ctx {trained}")
    if generation.get("do_sample"):
        names = ("temperature", "top_p", "top_k")
        found += [f"PARAMETER {n} {generation[n]}" for n in names if generation.get(n) is not None]
    else:
        found.append("PARAMETER temperature 0")
    penalty = generation.get("repetition_penalty") or 1.0
    return [*found, f"PARAMETER repeat_penalty {penalty}"]
