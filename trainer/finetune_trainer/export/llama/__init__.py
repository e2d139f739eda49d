"""llama.cpp's library in a process of its own, which it may abort.

llama_worker  what that process does
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field

from finetune_trainer.contract import Base
from finetune_trainer.export.reference import Generated, MeasuredRow, Measurement
from finetune_trainer.runtime import child

WORKER = "finetune_trainer.export.llama.llama_worker"

log = logging.getLogger(__name__)


class TokenizeRequest(Base):
    """Tokenize texts, and add what the file says is to be added to a text, as a server does."""

    do: Literal["tokenize"] = "tokenize"
    file: Path
    texts: tuple[str, ...]


class Reading(Base):
    """How llama.cpp reads texts with a file's own tokenizer."""

    tokens: tuple[tuple[int, ...], ...]
    """The tokens of each text."""

    adds_bos: bool
    adds_eos: bool
    stops_at: tuple[int, ...] = ()
    """Those of CheckRequest.ends at which llama.cpp ends an answer."""


class CheckRequest(Base):
    """Load a file, tokenize texts as they are, and measure the rows, if there are any.

    Every block of every tensor has to be finite.
    """

    do: Literal["check"] = "check"
    file: Path
    texts: tuple[str, ...]
    ends: tuple[int, ...]
    rows: tuple[MeasuredRow, ...]
    reference: Path | None
    """Log-probabilities that those of the rows are compared with."""

    places: tuple[int, ...] | None = None
    """Which of the rows are measured; all of them without it."""

    logprobs_file: Path | None
    """Gets the log-probabilities of the rows."""

    without_adapter: Path | None = None
    """An adapter's GGUF file, which is taken away from the model."""

    threads: int
    gpu: bool = False
    """Whether all layers fit into a GPU's memory."""


class CheckAnswer(Base):
    reading: Reading
    measurement: Measurement
    gpu: bool = False
    """Whether llama.cpp can use a GPU at all, as it was built."""


class GenerateRequest(Base):
    """Answer prompts, given as tokens, with greedy decoding."""

    do: Literal["generate"] = "generate"
    file: Path
    prompts: tuple[tuple[int, ...], ...]
    limit: int
    """The most tokens of an answer."""

    seconds: float
    """For all prompts and answers together; what is not finished by then is cut."""

    without_adapter: Path | None = None
    """As for a check."""

    threads: int
    gpu: bool = False


class GenerateAnswer(Base):
    answers: tuple[Generated | None, ...]
    """In the order of the prompts; None where there was no time to read one to its end."""


Request = Annotated[
    TokenizeRequest | CheckRequest | GenerateRequest,
    Field(discriminator="do"),
]
Answer = TypeVar("Answer", Reading, CheckAnswer, GenerateAnswer)


class LlamaError(Exception):
    """llama.cpp could not do it; the message is the last thing that it said."""


def call(
    request: Request, answer: type[Answer], on_progress: child.OnProgress | None = None
) -> Answer:
    """Send a request and wait for its kind of answer; raises LlamaError."""
    done = child.run(
        [sys.executable, "-m", WORKER], request.model_dump_json(), on_progress=on_progress
    )
    if done.status != 0:
        log.error("llama.cpp failed:\n%s", done.errors[-4000:])
        raise LlamaError(done.last_line())
    return answer.model_validate_json(done.output)
