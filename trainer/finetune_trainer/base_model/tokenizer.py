"""The tokenizer: loading it, and how a question and its answer become tokens."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune_trainer.outcome import Reason, StageError

log = logging.getLogger(__name__)

IGNORED = -100  # label of a token that no loss is computed on

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '### Response:\n' + message['content'] + eos_token }}"
    "{% else %}"
    "{{ '### ' + ('Instruction' if message['role'] == 'user' else 'Context') + ':\n'"
    " + message['content'] + '\n\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
"""For base models that come without a chat template. It is saved with the tokenizer, so that the
merged model and the GGUF files use what the training used."""


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer; it always has a chat template, an end token and a padding token.

    Raises StageError when transformers can't read it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        # What transformers raises for a broken or unknown tokenizer depends on where it broke.
        raise unsupported("tokenizer", error, trust_remote_code) from error
    if tokenizer.eos_token_id is None:
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            "The base model's tokenizer names no end token (eos_token), so a tuned model would "
            "never stop: add it to tokenizer_config.json.",
        )
    if not tokenizer.chat_template:
        log.warning(
            "The base model has no chat template; '### Instruction: … ### Response: …' is used"
        )
        tokenizer.chat_template = PLAIN_TEMPLATE
    if tokenizer.pad_token_id is None:
        # Not a new token: the vocabulary must keep the shape of the embeddings.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def message_pair(instruction: str, response: str) -> dict[str, Any]:
    """A row of the dataset as the training reads it (TRL's conversational prompt-completion)."""
    return {
        "prompt": [{"role": "user", "content": instruction}],
        "completion": [{"role": "assistant", "content": response}],
    }


def render_prompt(tokenizer: PreTrainedTokenizerBase, example: dict[str, Any]) -> str:
    """The question as text, up to where the model's answer begins."""
    text = tokenizer.apply_chat_template(
        example["prompt"], tokenize=False, add_generation_prompt=True
    )
    return str(text)


def encode(
    tokenizer: PreTrainedTokenizerBase, example: dict[str, Any]
) -> tuple[list[int], list[int]]:
    """Token ids of the whole turn, and labels: ids of the answer and its end, IGNORED before.

    This says what TRL will do (a test compares the two), so that `prepare` can count.
    """
    messages = example["prompt"] + example["completion"]
    ids = _ids(tokenizer, messages, prompt=False)
    prompt = _ids(tokenizer, example["prompt"], prompt=True)
    start = 0
    for ours, theirs in zip(ids, prompt, strict=False):
        if ours != theirs:
            break
        start += 1
    return ids, [IGNORED] * start + ids[start:]


def _ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, prompt: bool
) -> list[int]:
    ids = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=prompt, return_dict=False
    )
    return cast("list[int]", ids)


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The special tokens that the chat template puts behind an answer."""
    answer = "\N{SNOWMAN}"  # in no template, so that what follows it is the end of the turn
    text = str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}],
            tokenize=False,
        )
    )
    tail = tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return special.intersection(tail)


def unsupported(part: str, error: Exception, trusted: bool) -> StageError:
    """What a failure of transformers to load a part of the model means."""
    lines = str(error).strip().splitlines()
    cause = lines[0] if lines else type(error).__name__
    remedy = "Choose a model that this version of transformers supports"
    if "trust_remote_code" in str(error) and not trusted:
        remedy += ", or set spec.model.trustRemoteCode after reading the model's code"
    return StageError(
        Reason.MODEL_UNSUPPORTED,
        f"The base model's {part} can't be loaded: {cause.rstrip(' :.'):.300}. {remedy}.",
    )
