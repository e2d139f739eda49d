"""Makes sure, before anything is trained, that the chat template can do what the rows need."""

from __future__ import annotations

import hashlib
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune_trainer.base_model.tokenizer import BEGIN, PLAIN_TEMPLATE, end_of_turn_ids, render
from finetune_trainer.outcome import Reason, StageError

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


def describe_template(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The template for dataset-report.json."""
    text = str(tokenizer.get_chat_template())
    return {
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "fallback": text.removeprefix(BEGIN) == PLAIN_TEMPLATE,
    }


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
