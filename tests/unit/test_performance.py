"""docs/performance.md has what the model of the cost says today, and the model is sound."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.speed_model import (
    CASES,
    DEVICES,
    LABELS,
    MODELS,
    PAGE,
    ROW,
    Setup,
    cost,
    linear_flops,
    model_flops,
    planned,
    with_tables,
)


def test_the_tables_are_what_is_computed() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), "run python -m benchmarks.speed_model"
    assert page.count("| 8B | lora | 1 x H100 SXM 80 GB |") == 1


def setups() -> list[Setup]:
    found = [planned(model, method, device, n) for device in DEVICES for model, method, n in CASES]
    return [setup for setup in found if setup is not None]


@pytest.mark.parametrize("setup", setups(), ids=lambda s: f"{s.device.name}-{s.tokens}")
def test_no_lever_is_worth_more_than_there_is(setup: Setup) -> None:
    plain, liger = cost(setup), cost(replace(setup, liger=True))
    assert 0 < plain.mfu < liger.mfu < 1
    assert linear_flops(setup) <= setup.device.flops * plain.seconds
    assert liger.arithmetic == plain.arithmetic
    assert liger.bytes < plain.bytes


def test_the_flops_of_an_8b_model_are_those_of_its_parameters() -> None:
    """By hand: 6.98 thousand million linear weights and half of an output layer of 0.53."""
    setup = planned("8B", "lora", DEVICES[0])
    assert setup is not None
    head = 4096 * 128_256
    adapter = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024))
    pairs = 32 * 4096 * ROW / 2
    by_hand = 4 * 6_979_321_856 + 4 * LABELS * head + 6 * adapter + 12 * pairs
    assert model_flops(setup) / setup.tokens == pytest.approx(by_hand)


def test_an_8b_model_reaches_the_mark_with_liger() -> None:
    setup = planned("8B", "lora", DEVICES[0])
    assert setup is not None
    assert cost(setup).mfu < 0.43 < cost(replace(setup, liger=True)).mfu
    assert MODELS["8B"].parameters == pytest.approx(8.03e9, rel=0.01)
