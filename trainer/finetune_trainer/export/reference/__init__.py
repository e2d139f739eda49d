"""What the tuned model predicts, computed in float32 before anything is merged.

float32  log-probabilities of the base model with its adapter; weights stay in their files

Below is how log-probabilities of the next token are kept in a file, and how far two are apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

LEAST = -60_000.0  # nats; float16 ends at -65,504


@dataclass(frozen=True)
class MeasuredRow:
    """Some tokens of a conversation, and which of them are measured."""

    ids: tuple[int, ...]
    measured: tuple[int, ...]
    """Positions in `ids`, from 1 on. The tokens before such a position predict the one there."""


@dataclass(frozen=True)
class Measurement:
    """Means over the measured tokens of some rows."""

    tokens: int
    finite: bool
    """Whether all logits were finite; otherwise the means are of those that were."""

    perplexity: float
    kl_divergence: float
    """From the reference, in nats per token; 0 without one."""

    same_top_token: float
    """Share of tokens at which both find the same one most likely; 0 without a reference."""


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


@dataclass
class TokenSums:
    """Sums over tokens, from which a Measurement comes."""

    tokens: int = 0
    surprise: float = 0.0
    """Sum of -ln p of the tokens that came."""

    divergence: float = 0.0
    """Sum of the KL divergences from the reference."""

    same: int = 0
    """Tokens at which both find the same one most likely."""

    finite: bool = True

    def add(
        self, logits: npt.NDArray[Any], targets: Sequence[int], reference: npt.NDArray[Any] | None
    ) -> Floats | None:
        """Count in a model's logits (n, vocabulary), after which the tokens `targets` came.

        `reference` has the log-probabilities to compare with, (n, its vocabulary). A conversion may
        leave out rows of the embedding behind the vocabulary, so what both have is compared.
        Returns the log-probabilities, or None where the logits are not finite.
        """
        if not np.isfinite(logits).all():
            self.finite = False
            return None
        ours = normalised(logits)
        self.tokens += len(targets)
        self.surprise -= float(ours[np.arange(len(targets)), list(targets)].sum(dtype=np.float64))
        if reference is not None:
            self._compare(normalised(reference), ours)
        return ours

    def _compare(self, reference: Floats, ours: Floats) -> None:
        both = min(reference.shape[1], ours.shape[1])
        if reference.shape[1] != ours.shape[1]:
            reference, ours = normalised(reference[:, :both]), normalised(ours[:, :both])
        self.divergence += float(kl_divergence(reference, ours).sum())
        self.same += int((reference.argmax(axis=1) == ours.argmax(axis=1)).sum())

    def means(self) -> Measurement:
        tokens = max(1, self.tokens)
        return Measurement(
            tokens=self.tokens,
            finite=self.finite,
            perplexity=math.exp(min(self.surprise / tokens, 700.0)),
            kl_divergence=self.divergence / tokens,
            same_top_token=self.same / tokens,
        )
