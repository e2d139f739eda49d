"""The dataset as it really comes, read as text in bounded memory.

files -> bytes (unpacked) -> encoding -> CSV, JSON lines, a JSON array; or Parquet
  -> layout (which columns) -> conversations, one a row, each checked

A row never changes how another is read: there is one dialect, led by the header.

Every cell is text: `NA`, `null` and `0012` stay what they are. Reading goes on to the end, so that
all rows that can't be used are known; then they fail the run or are left out, as
spec.dataset.onInvalidRow says. Where it can't be told where rows begin (a quote that is never
closed, a file that is cut off), nothing is left out: the run fails.
"""

from __future__ import annotations

from finetune_trainer.prepare.reading.record import Problems, Record
from finetune_trainer.prepare.reading.source import Source, open_shards

__all__ = [
    "Problems",
    "Record",
    "Source",
    "open_shards",
]
