"""A GGUF file counts when llama.cpp loads it, reads text as the training did, and answers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune_trainer.base_model.loading import available_cpus
from finetune_trainer.base_model.tokenizer import (
    IGNORED,
    encode,
    end_of_turn_ids,
    render_prompt,
)
from finetune_trainer.config import Base
from finetune_trainer.export import llama
from finetune_trainer.outcome import Reason, StageError

MAX_ANSWER = 512  # tokens

log = logging.getLogger(__name__)


class Check(Base):
    """What a file answered; it goes into the manifest."""

    file: str
    question: str
    answer: str
    expected: str
    stopped: bool
    """Whether the model ended its answer itself, within twice the expected length."""


def verify(file: Path, tokenizer: PreTrainedTokenizerBase, example: dict[str, Any]) -> Check:
    """Ask the file the question of one training example, with greedy decoding.

    Raises StageError(QualityGateFailed) when it can't be loaded, splits the question into other
    tokens than the training did, does not know the token that ends a turn, computes numbers that
    are not finite, or says nothing. An answer without an end is reported and logged: a model that
    saw little data may ramble.
    """
    prompt = render_prompt(tokenizer, example)
    _, labels = encode(tokenizer, example)
    limit = min(2 * sum(label != IGNORED for label in labels) + 32, MAX_ANSWER)
    ends = sorted(end_of_turn_ids(tokenizer))
    try:
        said = llama.call(
            do="ask",
            file=str(file),
            prompt=prompt,
            limit=limit,
            ends=ends,
            threads=max(
                1, available_cpus() // 2
            ),  # they wait actively: on busy CPUs more are slower
        )
    except llama.LlamaError as error:
        raise _failed(file, f"llama.cpp can't load it: {error}") from error
    check = Check(
        file=file.name,
        question=example["prompt"][-1]["content"],
        answer=said["answer"],
        expected=example["completion"][-1]["content"],
        stopped=said["stopped"],
    )
    trained = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if said["tokens"] != trained:
        raise _failed(
            file,
            "llama.cpp splits a question into other tokens than the training did "
            f"({said['tokens'][:16]} instead of {trained[:16]})",
        )
    template = str(tokenizer.get_chat_template())
    if said["template"].strip() != template.strip():
        raise _failed(file, "its chat template is not the one that the training used")
    if not said["stopsAt"]:
        raise _failed(file, f"llama.cpp would not stop at the token that ends an answer ({ends})")
    if not said["finite"]:
        raise _failed(file, "it computes numbers that are not finite")
    if not check.answer.strip():
        raise _failed(file, f"it gives an empty answer to {check.question!r}")
    log.info("%s: %r -> %r", file.name, check.question, check.answer)
    if not check.stopped:
        log.warning("%s did not end its answer within %d tokens", file.name, limit)
    return check


def _failed(file: Path, cause: str) -> StageError:
    return StageError(
        Reason.QUALITY_GATE_FAILED,
        f"The file {file.name} is not usable: {cause}.",
    )
