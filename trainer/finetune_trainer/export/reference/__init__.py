"""What the tuned model predicts, computed in float32 before anything is merged.

float32  log-probabilities of the base model with its adapter, and of the merged model beside it;
         weights stay in their files

Below is how log-probabilities of the next token are kept in a file, and how far two are apart.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from finetune_trainer.contract import Base, Reason
from finetune_trainer.model import ModelFolder

Floats = npt.NDArray[np.float32]

TOKENS_OF_PASS = 1024  # with padding: what bounds the activations
ANSWERS_OF_PASS = 128  # what bounds the logits
LEAST = -60_000.0  # nats; float16 ends at -65,504


@dataclass(frozen=True)
class MeasuredRow:
    """Some tokens of a conversation, and which of them are measured."""

    ids: tuple[int, ...]
    measured: tuple[int, ...]
    """Positions in `ids`, from 1 on. The tokens before such a position predict the one there."""


class Generated(Base):
    """A model's answer to a prompt."""

    text: str
    tokens: int
    stopped: bool
    """Whether the model ended it itself."""

    @classmethod
    def of(cls, tokenizer: Any, tokens: Sequence[int], ends: Collection[int]) -> Self:
        """Of the tokens of an answer, which one of `ends` ends."""
        at = next((place for place, token in enumerate(tokens) if token in ends), None)
        said = list(tokens[:at])
        text = tokenizer.decode(said, skip_special_tokens=True)
        return cls(text=text, tokens=len(said), stopped=at is not None)


def passes(rows: Sequence[MeasuredRow]) -> Iterator[list[MeasuredRow]]:
    """Rows in groups, each small enough for one forward pass."""
    group: list[MeasuredRow] = []
    for row in rows:
        longest = max(len(item.ids) for item in [*group, row])
        answers = sum(len(item.measured) for item in [*group, row])
        too_large = longest * (len(group) + 1) > TOKENS_OF_PASS or answers > ANSWERS_OF_PASS
        if group and too_large:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


@dataclass(frozen=True)
class Measurement:
    """What was measured at each token of some rows, row after row."""

    surprise: tuple[float, ...]
    """-ln p of the token that came, in nats."""

    divergence: tuple[float, ...] = ()
    """KL divergence from the reference, in nats; empty without one."""

    same_top: tuple[bool, ...] = ()
    """Whether both find the same token most likely; empty without a reference."""

    finite: bool = True
    """Whether all logits were finite; otherwise tokens are missing."""

    @property
    def tokens(self) -> int:
        return len(self.surprise)

    @property
    def perplexity(self) -> float:
        return math.exp(min(_mean(self.surprise), 700.0))

    @property
    def kl_divergence(self) -> float:
        """The mean, in nats per token; 0 without a reference."""
        return _mean(self.divergence)

    @property
    def same_top_token(self) -> float:
        """Share of tokens, 0 to 1; 0 without a reference."""
        return _mean(self.same_top)

    def only(self, kept: Sequence[bool]) -> Measurement:
        """The same of those tokens for which `kept` is true; all where some are missing."""
        if all(kept) or len(kept) != self.tokens:
            return self
        return Measurement(
            surprise=tuple(compress(self.surprise, kept)),
            divergence=tuple(compress(self.divergence, kept)),
            same_top=tuple(compress(self.same_top, kept)),
            finite=self.finite,
        )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


class ReferenceRequest(Base):
    base: ModelFolder
    adapter: Path | None
    rows: tuple[MeasuredRow, ...]
    tuned_file: Path
    """Gets the log-probabilities of base model and adapter."""

    base_file: Path
    """Gets those of the base model alone, where there is an adapter."""

    merged: ModelFolder | None = None
    """The merged model, if it is there."""

    prompts: tuple[tuple[int, ...], ...] = ()
    """Prompts as tokens, which the merged model answers."""

    answer_tokens: int = 0
    """The most of an answer."""

    answer_seconds: float = 0.0
    """For all answers together, about; what is not finished by then is cut."""


class ReferenceAnswer(Base):
    """What was measured; base and merged model are measured against the tuned one."""

    tuned: Measurement
    base: Measurement | None = None
    merged: Measurement | None = None
    answers: tuple[Generated, ...] = ()
    """The merged model's, in the order of the prompts; empty where it had no time for them."""


class Refusal(Base):
    """A StageError of the child process."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class Reference:
    """What the files are held against, and what was found out about the merged model meanwhile."""

    tuned_file: Path
    """Log-probabilities of base model and adapter, as `create_logprobs` lays them out."""

    base_file: Path | None
    """Those of the base model alone; None without an adapter."""

    tuned: Measurement
    base: Measurement | None
    """Against the tuned model."""

    merged: Measurement | None = None
    """Against the tuned model as well."""

    answers: tuple[Generated, ...] = ()
    """The merged model's answers."""

    @classmethod
    def of(cls, request: ReferenceRequest, answer: ReferenceAnswer) -> Self:
        """What was answered to a request."""
        base_file = request.base_file if answer.base else None
        return cls(request.tuned_file, base_file, **dict(answer))

    @property
    def answer(self) -> ReferenceAnswer:
        """What was measured, without the files."""
        return ReferenceAnswer(
            tuned=self.tuned, base=self.base, merged=self.merged, answers=self.answers
        )


def create_logprobs(file: Path, tokens: int, vocabulary: int) -> npt.NDArray[np.float16]:
    """A file for (tokens, vocabulary) log-probabilities in nats, as a memory-mapped array.

    float16 halves it. Since readers normalise what they read, the rounding adds no more than 1e-6
    to a divergence (a test shows it).
    """
    mapped: npt.NDArray[np.float16] = np.lib.format.open_memmap(
        file, mode="w+", dtype=np.float16, shape=(tokens, vocabulary)
    )
    return mapped


def read_logprobs(file: Path) -> npt.NDArray[np.float16]:
    """Open what `create_logprobs` made."""
    mapped: npt.NDArray[np.float16] = np.load(file, mmap_mode="r")
    return mapped


def store_logprobs(target: npt.NDArray[np.float16], start: int, values: Floats) -> None:
    """Put log-probabilities into a file from row `start` on."""
    np.maximum(values, LEAST, out=values)
    target[start : start + len(values)] = values


def normalised(values: npt.NDArray[Any]) -> Floats:
    """Logits, or rounded log-probabilities, (n, vocabulary) as log-probabilities in nats."""
    shifted = values.astype(np.float32)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, dtype=np.float64, keepdims=True))
    return shifted


def kl_divergence(reference: Floats, other: Floats) -> npt.NDArray[np.float64]:
    """KL(reference || other) of each row of log-probabilities, in nats; never negative."""
    each = (np.exp(reference) * (reference - other)).sum(axis=1, dtype=np.float64)
    positive: npt.NDArray[np.float64] = np.maximum(each, 0.0)
    return positive


class Meter:
    """Takes logits, and becomes a Measurement."""

    def __init__(self) -> None:
        self._surprise: list[float] = []
        self._divergence: list[float] = []
        self._same_top: list[bool] = []
        self._finite = True

    def add(
        self, logits: npt.NDArray[Any], targets: Sequence[int], reference: npt.NDArray[Any] | None
    ) -> Floats | None:
        """Count in a model's logits (n, vocabulary), after which the tokens `targets` came.

        `reference` has the log-probabilities to compare with, (n, its vocabulary). A conversion may
        leave out rows of the embedding behind the vocabulary, so what both have is compared.
        Returns the log-probabilities, or None where the logits are not finite.
        """
        if not np.isfinite(logits).all():
            self._finite = False
            return None
        ours = normalised(logits)
        self._surprise += (-ours[np.arange(len(targets)), list(targets)]).tolist()
        if reference is not None:
            self._compare(normalised(reference), ours)
        return ours

    def _compare(self, reference: Floats, ours: Floats) -> None:
        both = min(reference.shape[1], ours.shape[1])
        if reference.shape[1] != ours.shape[1]:
            reference, ours = normalised(reference[:, :both]), normalised(ours[:, :both])
        self._divergence += kl_divergence(reference, ours).tolist()
        self._same_top += (reference.argmax(axis=1) == ours.argmax(axis=1)).tolist()

    def measurement(self) -> Measurement:
        return Measurement(
            surprise=tuple(self._surprise),
            divergence=tuple(self._divergence),
            same_top=tuple(self._same_top),
            finite=self._finite,
        )
