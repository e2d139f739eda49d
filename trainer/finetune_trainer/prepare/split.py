"""Which rows are held out, which say the same, and which are in both files: by their hashes.

A row's hash is 64 bits over its messages and the seed, so a million rows take 8 MB, and rows that
say the same have the same hash and stay together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_trainer.contract import Message, Tool

Hashes = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]

FEWEST_ROWS = 20  # a data set with fewer is trained on as a whole
_ALWAYS = ("role", "content")  # keys that each message has
MOST_HELD_OUT = 1000  # more rows make the measured loss hardly more exact, and take longer


def row_hash(messages: Sequence[Message], seed: int, tools: Sequence[Tool] = ()) -> int:
    """64 bits over what is said, the tools and the seed.

    Roles and contents alone make up the hash of a row that has nothing else.
    """
    said: list[Any] = [
        [m["role"], m["content"]] if len(m) == len(_ALWAYS) else [m["role"], m["content"], m]
        for m in messages
    ]
    text = json.dumps([*said, tools] if tools else said, ensure_ascii=False)
    key = seed.to_bytes(8, "big")
    # A lone surrogate can't be encoded strictly, and is a row like any other here.
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8, key=key)
    return int.from_bytes(digest.digest(), "big")


def share(rows: int, fraction: float) -> int:
    """How many of `rows` are to be held out."""
    if fraction == 0 or rows < FEWEST_ROWS:
        return 0
    return min(max(1, round(rows * fraction)), MOST_HELD_OUT)


def hold_out(hashes: Hashes, fraction: float) -> Mask:
    """Choose the rows that are held out: those with the smallest hashes.

    What is guaranteed: the choice depends on the rows' contents and the seed (which is in the
    hashes), not on their order; rows that say the same are all held out or all trained on; and in
    a file that has grown, the held-out ones of the old rows are still the first so many of the
    same order, so that none changes places with another. Rows that are there so often that they
    don't fit into the number asked for are passed over; where no others are, the ones that are
    there least often are taken. Something is always left to train on.
    """
    held = np.zeros(len(hashes), dtype=np.bool_)
    wanted = share(len(hashes), fraction)
    distinct, counts = np.unique(hashes, return_counts=True)  # ascending
    if not wanted or len(distinct) < 2:
        return held
    chosen = []
    for value, count in zip(distinct.tolist(), counts.tolist(), strict=True):
        if count <= wanted:
            chosen.append(value)
            wanted -= count
        if not wanted:
            break
    if not chosen:
        chosen = [int(distinct[np.argmin(counts)])]
    return np.isin(hashes, np.array(chosen, dtype=np.uint64))


def repeated(hashes: Hashes) -> Mask:
    """Rows that say the same as an earlier one."""
    again = np.ones(len(hashes), dtype=np.bool_)
    again[np.unique(hashes, return_index=True)[1]] = False
    return again


def shared(hashes: Hashes, others: Hashes) -> Mask:
    """Rows of `hashes` that are in the other file as well."""
    return np.isin(hashes, others)
