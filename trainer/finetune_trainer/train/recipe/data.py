"""The examples as token ids and labels, and which of them train together."""

from __future__ import annotations

import fcntl
import heapq
import itertools
import json
import logging
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import Objective, Reason, StageError, digest
from finetune_trainer.model.token_rows import (
    TokensOf,
    TokensWriter,
    read_about,
    tokens_of,
    with_labels,
)
from finetune_trainer.model.tokenizer import IGNORED, encode_sides

TOKENIZED_AT_ONCE = 512  # conversations in memory as text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizedRows:
    """The rows of one file."""

    rows: datasets.Dataset
    """input_ids and labels; labels are IGNORED where nothing is learnt. Of pairs (dpo, orpo) these
    are the chosen answer's, and rejected_ids and rejected_labels the other's. With kto `desirable`
    is the label of the row."""

    lengths: NDArray[np.int32]
    """Tokens of each row; of a pair, of both conversations."""

    targets: NDArray[np.int32]
    """Labels of each row that count for the loss; of a pair, of the answer that has fewer."""

    learns_end: bool
    """Whether some row teaches the end of a turn."""

    longest: NDArray[np.int32]
    """Tokens of each row's longest conversation."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """Tokens of one pass over all rows."""
        return int(self.lengths.sum(dtype=np.int64))


def tokenize(
    file: Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    cache: Path,
    objective: Objective = "sft",
    *,
    split_at: int | None = None,
    prepared: Path | None = None,
) -> TokenizedRows:
    """The rows of a file of `prepare` in tokens, each cut at `max_length`.

    Where `objective` is kto, a pair becomes two rows. Plain text is split at `split_at` tokens
    (`max_length` if left out), so that its rows are as many, however short the memory has them cut.
    `prepared` has the tokens that `prepare` left. Where they are of another tokenizer or length,
    the file is tokenized, once for all processes and later workers, into the folder `cache`.
    """
    of = tokens_of(tokenizer, objective, max_length, split_at)
    if prepared is not None:
        found = read_about(prepared)
        if found == of:
            log.info("%s: the tokens that prepare left are used", file.name)
            return read_tokens(prepared)
        why = f"differ in {of.differs(found)}" if found else "can't be read"
        log.info("%s is tokenized: the tokens that prepare left %s", file.name, why)
    cache.mkdir(parents=True, exist_ok=True)
    about = file.stat()
    made = cache / f"{digest([file.stem, about.st_size, about.st_mtime_ns, of.model_dump()])}.arrow"
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            _write_tokens(file, tokenizer, of, made)
    return read_tokens(made)


def _write_tokens(
    file: Path, tokenizer: PreTrainedTokenizerBase, of: TokensOf, target: Path
) -> None:
    unfinished = target.with_suffix(".part")
    with (
        file.open(encoding="utf-8") as lines,
        TokensWriter(unfinished, tokenizer, of) as writer,
    ):
        while chunk := [json.loads(line) for line in itertools.islice(lines, TOKENIZED_AT_ONCE)]:
            for example, sides in zip(chunk, encode_sides(tokenizer, chunk), strict=True):
                writer.add(example, sides)
    unfinished.rename(target)


def read_tokens(file: Path) -> TokenizedRows:
    """Map a file of tokens into memory."""
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_file(str(file))
    arrays = rows.select_columns(["targets", "end"]).with_format("numpy")
    sides = [_lengths(rows, name) for name in rows.column_names if name.endswith("_ids")]
    return TokenizedRows(
        rows=rows.remove_columns(["targets", "end"]).with_transform(with_labels),
        lengths=np.sum(sides, axis=0, dtype=np.int32),
        longest=np.max(sides, axis=0),
        targets=np.asarray(arrays["targets"][:], dtype=np.int32),
        learns_end=bool(np.any(arrays["end"][:])),
    )


def check_rows(examples: TokenizedRows, *, shortened: bool) -> None:
    """Raise StageError where a row teaches nothing, or no row the end of a turn."""
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


def _lengths(rows: datasets.Dataset, name: str) -> NDArray[np.int32]:
    """Length of each row, from the offsets that Arrow keeps, without reading the ids."""
    chunks = rows.data.column(name).chunks
    parts = [np.diff(chunk.offsets.to_numpy()) for chunk in chunks]
    return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)


RowNumbers = list[int]


@dataclass(frozen=True)
class PassLimits:
    """What one pass may hold on each of `processes`.

    `rows` rows of any length fit the memory, and so do any rows of `tokens` tokens together.
    """

    rows: int
    tokens: int = 0
    processes: int = 1
    packed: bool = True
    """Whether rows are laid end to end (their sum counts) or padded to the longest."""

    def allow(self, sizes: Sequence[int]) -> bool:
        """Whether rows of these lengths may share a pass."""
        return len(sizes) <= self.rows or self.size(sizes) <= self.tokens

    def size(self, sizes: Sequence[int]) -> int:
        """Tokens of a pass over rows of these lengths."""
        return sum(sizes) if self.packed else len(sizes) * max(sizes, default=0)


@dataclass(frozen=True)
class Schedule:
    """All steps of a training."""

    lengths: NDArray[np.int32]
    """Tokens of each row."""

    batch: int
    """Rows in a step (the effective batch); the last step of an epoch has what is left."""

    seed: int

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return math.ceil(len(self.lengths) / self.batch)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Rows of an epoch in the order of its steps."""
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths))

    def passes(self, epoch: int, limits: PassLimits) -> Iterator[list[list[RowNumbers]]]:
        """For every step of an epoch its passes, as few as fit: the rows for each process."""
        order = self.order(epoch)
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            ordered = rows[np.argsort(-self.lengths[rows], kind="stable")]
            found = fewest_groups(self.lengths[ordered].tolist(), limits)
            groups = [ordered[group].tolist() for group in found]
            yield [
                groups[first : first + limits.processes]
                for first in range(0, len(groups), limits.processes)
            ]

    def tokens(self, steps: int) -> int:
        """Tokens of the first so many steps, over all epochs."""
        epochs, rest = divmod(steps, self.steps)
        full_epochs = epochs * int(self.lengths.sum(dtype=np.int64))
        if not rest:
            return full_epochs
        rows = self.order(epochs)[: rest * self.batch]
        return full_epochs + int(self.lengths[rows].sum(dtype=np.int64))


SEARCHED_ROWS, SEARCHED_STATES = 64, 2000  # beyond, a step may get a pass too many


def fewest_groups(sizes: Sequence[int], limits: PassLimits) -> list[RowNumbers]:
    """Divide rows, given by size with the largest first, into the fewest groups that are allowed.

    As many for each process. Groups of like size are neighbours; the last ones may be empty.
    """
    largest = max(limits.tokens, limits.size(sizes[: limits.rows]))
    least = math.ceil(sum(sizes) / (largest * limits.processes))
    most = math.ceil(len(sizes) / (limits.rows * limits.processes))
    for passes in range(min(least, most), most + 1):
        for groups in _divisions(sizes, passes * limits.processes, limits):
            by_group = [[sizes[row] for row in group] for group in groups]
            if all(map(limits.allow, by_group)):
                order = sorted(range(len(groups)), key=lambda index: -limits.size(by_group[index]))
                return [groups[index] for index in order]
    raise AssertionError("groups of `rows` rows are always allowed")


def _divisions(sizes: Sequence[int], count: int, limits: PassLimits) -> Iterator[list[RowNumbers]]:
    """Ways to make so many groups, from the most even one to the one that wastes least."""
    if limits.packed:
        yield balanced_groups(range(len(sizes)), sizes, count)
        if len(sizes) <= SEARCHED_ROWS:
            found = _search(sizes, count, limits)
        else:
            found = _best_fit(sizes, limits.tokens)
    else:
        found = _full_groups(sizes, limits)
    yield contiguous_groups(range(len(sizes)), count)
    if found and len(found) <= count:
        yield found + [[] for _ in range(count - len(found))]


def _search(sizes: Sequence[int], count: int, limits: PassLimits) -> list[RowNumbers] | None:
    """Try to fit packed rows into so many groups, each row first where the least room is left."""
    groups: list[RowNumbers] = [[] for _ in range(count)]
    totals, states = [0] * count, 0

    def place(row: int) -> bool:
        nonlocal states
        if row == len(sizes):
            return True
        tried = set()
        for index in sorted(range(count), key=lambda index: -totals[index]):
            alike = totals[index], len(groups[index])
            fits = len(groups[index]) < limits.rows or totals[index] + sizes[row] <= limits.tokens
            if not fits or alike in tried or states == SEARCHED_STATES:
                continue
            tried.add(alike)
            states += 1
            groups[index].append(row)
            totals[index] += sizes[row]
            if place(row + 1):
                return True
            groups[index].pop()
            totals[index] -= sizes[row]
        return False

    return groups if place(0) else None


def _best_fit(sizes: Sequence[int], tokens: int) -> list[RowNumbers]:
    """Put each row where the least room is left for it, or into a new group."""
    groups: list[RowNumbers] = []
    room: list[tuple[int, int]] = []  # of each group with its index, sorted
    for row, size in enumerate(sizes):
        place = bisect_left(room, (size, 0))
        if place == len(room):
            groups.append([row])
            insort(room, (tokens - size, len(groups) - 1))
            continue
        left, index = room.pop(place)
        groups[index].append(row)
        insort(room, (left - size, index))
    return groups


def _full_groups(sizes: Sequence[int], limits: PassLimits) -> list[RowNumbers]:
    """Neighbours, as many as may be padded together. No division has fewer groups."""
    groups, start = [], 0
    while start < len(sizes):
        end = min(start + max(limits.rows, limits.tokens // sizes[start]), len(sizes))
        groups.append(list(range(start, end)))
        start = end
    return groups


def balanced_groups(rows: Sequence[int], sizes: Sequence[int], count: int) -> list[RowNumbers]:
    """Groups with about the same sum of sizes: each row, the longest first, joins the smallest.

    No group holds more than the longest row times the (rounded up) number of rows per group.
    """
    groups: list[RowNumbers] = [[] for _ in range(count)]
    heap = [(0, index) for index in range(count)]
    for row, size in zip(rows, sizes, strict=True):
        total, index = heapq.heappop(heap)
        groups[index].append(row)
        heapq.heappush(heap, (total + size, index))
    return groups


def contiguous_groups(rows: Sequence[int], count: int) -> list[RowNumbers]:
    """Groups of neighbours, as equal in number as can be; the larger ones come last."""
    cuts = [len(rows) * index // count for index in range(count + 1)]
    return [list(rows[start:end]) for start, end in itertools.pairwise(cuts)]


class StepSampler(torch.utils.data.Sampler[list[RowNumbers]]):
    """Yields this process's rows step by step, a list for each pass; empty where it has none."""

    def __init__(
        self, schedule: Schedule, limits: PassLimits, process: int, epoch: Callable[[], int]
    ) -> None:
        self._schedule = schedule
        self._limits = limits
        self._process = process
        self._epoch = epoch  # asked when an epoch begins

    def __len__(self) -> int:
        return self._schedule.steps

    def __iter__(self) -> Iterator[list[RowNumbers]]:
        for step in self._schedule.passes(self._epoch(), self._limits):
            yield [groups[self._process] for groups in step]


@dataclass(frozen=True)
class RowLists(torch.utils.data.Dataset[list[dict[str, Any]]]):
    """Rows by lists of their numbers, so that a loader makes a pass of each."""

    rows: datasets.Dataset

    def __getitem__(self, numbers: RowNumbers) -> list[dict[str, Any]]:
        return self.rows.__getitems__(numbers) if numbers else []

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class PaddingCollator:
    """Rows below each other, filled up to the longest: tensors of [rows, time]."""

    pad: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = rows or [{"input_ids": [self.pad], "labels": [IGNORED]}]
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), self.pad, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[index, :length] = torch.tensor(row["input_ids"])
            labels[index, :length] = torch.tensor(row["labels"])
            mask[index, :length] = 1
        labels[:, 0] = IGNORED
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass(frozen=True)
class PackingCollator:
    """Rows end to end: tensors of [1, time]; each row's positions begin at 0 again.

    There is no attention mask. Attention functions see the rows' bounds in `cu_seq_lens_*` (as
    FlashAttention calls them) or in the positions.
    """

    pad: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        rows = rows or [{"input_ids": [self.pad], "labels": [IGNORED]}]
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [torch.tensor(row["labels"]) for row in rows]
        for row in labels:
            row[0] = IGNORED  # the row before must not learn to predict it
        lengths = [len(row) for row in ids]
        bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        return {
            "input_ids": torch.cat(ids)[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "labels": torch.cat(labels)[None],
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }
