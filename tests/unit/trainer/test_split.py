"""Which rows are held out: how many, which, and what stays the same when the file changes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.contract import Message
from finetune_trainer.prepare.dataset_files import (
    Hashes,
    hold_out,
    repeated,
    row_hash,
    share,
    shared,
)


def hashes(count: int, seed: int = 42, start: int = 0) -> Hashes:
    rows = range(start, start + count)
    return np.array(
        [row_hash([{"role": "user", "content": f"question {n}"}], seed) for n in rows],
        dtype=np.uint64,
    )


@pytest.mark.parametrize(
    ("rows", "fraction", "expected"),
    [
        (19, 0.05, 0),
        (20, 0.05, 2),
        (28, 0.05, 3),
        (28, 0.0, 0),
        (28, 0.5, 14),
        (28, 0.02, 1),
        (40, 0.1, 4),
        (100, 0.05, 10),
        (300, 0.05, 20),
        (400, 0.05, 20),
        (1000, 0.05, 50),
        (20_000, 0.05, 1000),
        (1_000_000, 0.5, 1000),
        (0, 0.05, 0),
    ],
)
def test_how_many_rows_are_held_out(rows: int, fraction: float, expected: int) -> None:
    assert share(rows, fraction) == expected


def test_the_choice_depends_on_content_and_seed_only() -> None:
    found = hashes(200)
    held = hold_out(found, 0.05)
    assert held.sum() == 20
    order = np.random.default_rng(0).permutation(200)
    assert (hold_out(found[order], 0.05) == held[order]).all()
    assert (hold_out(hashes(200), 0.05) == held).all()
    assert (hold_out(hashes(200, seed=7), 0.05) != held).any()


def test_what_makes_up_a_row() -> None:
    row: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert row_hash(row, 1) == row_hash(copy.deepcopy(row), 1)
    others: list[list[Message]] = [
        [{"role": "user", "content": "ab"}, {"role": "assistant", "content": ""}],
        [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}],
        [*row, *row],
    ]
    assert len({row_hash(r, 1) for r in [row, *others]} | {row_hash(row, 2)}) == 5
    row_hash([{"role": "user", "content": "\ud800"}], 1)


@given(old=st.integers(20, 300), new=st.integers(0, 300))
def test_rows_that_are_appended_make_no_others_change_places(old: int, new: int) -> None:
    before = hashes(old)
    after = np.concatenate([before, hashes(new, start=old)])
    first, then = hold_out(before, 0.05), hold_out(after, 0.05)[:old]
    assert not ((first & ~then).any() and (then & ~first).any())


@given(st.lists(st.integers(0, 40), min_size=20, max_size=200), st.floats(0.01, 0.5))
def test_rows_that_say_the_same_are_on_one_side(values: list[int], fraction: float) -> None:
    found = np.array(values, dtype=np.uint64)
    held = hold_out(found, fraction)
    assert not set(found[held].tolist()) & set(found[~held].tolist())
    assert (~held).any()
    assert held.any() == (len(set(values)) > 1)


def test_a_row_that_is_there_too_often_is_passed_over() -> None:
    found = np.concatenate([np.zeros(50, dtype=np.uint64), hashes(50)])
    held = hold_out(found, 0.05)
    assert held.sum() == 10
    assert not held[:50].any()


def test_repeated_rows_are_those_after_the_first() -> None:
    found = np.array([5, 3, 5, 5, 3, 1], dtype=np.uint64)
    assert repeated(found).tolist() == [False, False, True, True, True, False]


def test_rows_of_both_files_are_found() -> None:
    ours, theirs = np.array([1, 2, 3, 2], dtype=np.uint64), np.array([2, 9], dtype=np.uint64)
    assert shared(ours, theirs).tolist() == [False, True, False, True]
    assert shared(ours, np.array([], dtype=np.uint64)).tolist() == [False] * 4
