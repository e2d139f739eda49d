"""The examples as token ids and labels, in a memory-mapped file.

    examples.jsonl -> the tokenizer's chat template -> input_ids, labels   (one row an example)

A million rows need disk, not memory: only the lengths (four bytes a row) are held in memory.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from finetune_trainer.base_model.tokenizer import IGNORED, encode_batch, end_of_turn_ids
from finetune_trainer.outcome import Reason, StageError

TOKENIZED_AT_ONCE = 512  # conversations in memory as text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examples:
    """Rows of one file."""

    rows: datasets.Dataset
    """input_ids and labels; labels are IGNORED where nothing is learnt."""

    lengths: NDArray[np.int32]
    """Tokens of each row."""

    targets: NDArray[np.int32]
    """Labels of each row that count for the loss."""

    learns_end: bool
    """Whether some row teaches the end of a turn."""

    def __len__(self) -> int:
        """Rows."""
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """Tokens of one pass over all rows."""
        return int(self.lengths.sum(dtype=np.int64))


def tokenize(
    file: Path, tokenizer: PreTrainedTokenizerBase, max_length: int, cache: Path
) -> Examples:
    """Tokenize a file of `prepare`, cut each row at `max_length`, and keep the result in `cache`.

    A later worker in the same folder, and the other processes of this one, find it there.
    """
    datasets.disable_progress_bars()
    about = file.stat()
    rows = datasets.Dataset.from_generator(
        _rows,
        gen_kwargs={"file": file, "tokenizer": tokenizer, "max_length": max_length},
        features=datasets.Features(
            {
                "input_ids": datasets.List(datasets.Value("int32")),
                "labels": datasets.List(datasets.Value("int32")),
                "targets": datasets.Value("int32"),
                "end": datasets.Value("bool"),
            }
        ),
        cache_dir=str(cache),
        # Given by hand: working it out would pickle the tokenizer.
        fingerprint=f"{file.stem}-{about.st_size}-{about.st_mtime_ns}-{max_length}",
    )
    arrays = rows.select_columns(["targets", "end"]).with_format("numpy")
    return Examples(
        rows=rows.select_columns(["input_ids", "labels"]),
        lengths=_lengths(rows),
        targets=np.asarray(arrays["targets"][:], dtype=np.int32),
        learns_end=bool(np.any(arrays["end"][:])),
    )


def check(examples: Examples, *, shortened: bool) -> None:
    """Make sure that every row teaches something and that the end of the turn is learnt."""
    empty = int((examples.targets == 0).sum())
    if empty and not shortened:
        # `prepare` leaves such rows out, so this is another tokenizer than it saw.
        raise StageError(
            Reason.INTERNAL_ERROR,
            f"{empty} of {len(examples)} examples have no answer within maxSequenceLength.",
        )
    if empty:
        log.warning(
            "%d of %d examples have no answer within the shortened sequence and teach nothing",
            empty,
            len(examples),
        )
    if not examples.learns_end:
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            "No example's labels contain an end-of-turn token, so the tuned model would never "
            "stop: raise training.maxSequenceLength, or correct the model's chat template.",
        )


def _rows(
    file: Path, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[dict[str, Any]]:
    ends = end_of_turn_ids(tokenizer)
    with file.open(encoding="utf-8") as lines:
        while chunk := [json.loads(line) for line in itertools.islice(lines, TOKENIZED_AT_ONCE)]:
            for encoded in encode_batch(tokenizer, chunk):
                ids, labels = encoded.ids[:max_length], encoded.labels[:max_length]
                yield {
                    "input_ids": ids,
                    "labels": labels,
                    # The first token is predicted from nothing.
                    "targets": sum(label != IGNORED for label in labels[1:]),
                    "end": not ends.isdisjoint(labels),
                }


def _lengths(rows: datasets.Dataset) -> NDArray[np.int32]:
    """Length of each row, from the offsets that Arrow keeps, without reading the ids."""
    chunks = rows.data.column("input_ids").chunks
    parts = [np.diff(chunk.offsets.to_numpy()) for chunk in chunks]
    return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)
