"""A step in as few passes as fit: no pass above its limits, each row once, on every process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.train.recipe.data import PassLimits, Schedule, fewest_groups

limits = st.builds(
    PassLimits,
    rows=st.integers(1, 4),
    tokens=st.integers(0, 120),
    processes=st.integers(1, 3),
    packed=st.booleans(),
)
sizes = st.lists(st.integers(1, 50), min_size=1, max_size=7)


def partitions(rows: Sequence[int]) -> Iterator[list[list[int]]]:
    """Every way to divide rows into groups."""
    if not rows:
        yield []
        return
    first, rest = rows[0], rows[1:]
    for groups in partitions(rest):
        yield [[first], *groups]
        for index, group in enumerate(groups):
            yield [*groups[:index], [first, *group], *groups[index + 1 :]]


@settings(max_examples=200, deadline=None)
@given(sizes, limits)
def test_no_division_has_fewer_passes(found: list[int], each: PassLimits) -> None:
    found.sort(reverse=True)
    groups = fewest_groups(found, each)
    assert sorted(itertools.chain(*groups)) == list(range(len(found)))
    assert all(each.allow([found[row] for row in group]) for group in groups)
    allowed = (
        len(division)
        for division in partitions(range(len(found)))
        if all(each.allow([found[row] for row in group]) for group in division)
    )
    assert len(groups) == -(-min(allowed) // each.processes) * each.processes


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=300), st.integers(1, 100), limits)
def test_every_process_has_a_part_of_every_pass(
    lengths: list[int], batch: int, each: PassLimits
) -> None:
    schedule = Schedule(np.array(lengths, dtype=np.int32), batch, seed=1)
    steps = list(schedule.passes(0, each))
    assert len(steps) == schedule.steps
    order = schedule.order(0).tolist()
    for number, step in enumerate(steps):
        assert all(len(groups) == each.processes for groups in step)
        rows = [row for groups in step for group in groups for row in group]
        assert sorted(rows) == sorted(order[number * batch : (number + 1) * batch])


@pytest.mark.parametrize(("packed", "before", "now"), [(True, 4, 1), (False, 4, 2)])
def test_one_long_row_does_not_divide_the_others(packed: bool, before: int, now: int) -> None:
    """Two of the longest rows fit a pass. Short ones are as many as have their tokens."""
    row_lengths = [2000, 300, 300, 300, 200, 200, 100, 100]
    by_rows = PassLimits(2, packed=packed)
    by_tokens = PassLimits(2, 4000, packed=packed)
    assert len(fewest_groups(row_lengths, by_rows)) == before
    assert len(fewest_groups(row_lengths, by_tokens)) == now


def test_a_large_step_is_divided_at_once() -> None:
    """Thousands of rows, which nobody could try all divisions of."""
    lengths = sorted(np.random.default_rng(0).integers(1, 2048, 4096).tolist(), reverse=True)
    for packed in (True, False):
        each = PassLimits(1, 8192, 8, packed=packed)
        groups = fewest_groups(lengths, each)
        assert max(each.size([lengths[row] for row in group]) for group in groups) <= 8192
        waste = 0.01 if packed else 0.15  # the padding
        assert len(groups) * 8192 < (1 + waste) * sum(lengths) + 8 * 8192
