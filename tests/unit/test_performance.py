"""docs/performance.md has what the model of the cost says today, and the model is sound."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.speed_model import (
    CASES,
    DEVICES,
    H100,
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
    found = [
        planned(MODELS[model], method, device, n)
        for device in DEVICES
        for model, method, n in (*CASES, ("1B", "full", 1))
    ]
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
    setup = planned(MODELS["8B"], "lora", H100)
    assert setup is not None
    head = 4096 * 128_256
    adapter = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024))
    pairs = 32 * 4096 * ROW / 2
    by_hand = 4 * 6_979_321_856 + 4 * LABELS * head + 6 * adapter + 12 * pairs
    assert model_flops(setup) / setup.tokens == pytest.approx(by_hand)


def test_an_8b_model_reaches_the_mark_with_liger() -> None:
    setup = planned(MODELS["8B"], "lora", H100)
    assert setup is not None
    assert cost(setup).mfu < 0.43 < cost(replace(setup, liger=True)).mfu
    assert MODELS["8B"].parameters == pytest.approx(8.03e9, rel=0.01)


def test_a_share_of_recomputed_layers_costs_that_share() -> None:
    kept = planned(MODELS["8B"], "lora", H100)
    assert kept is not None
    speeds = []
    for every in (1, 2, 4):
        update = {"gradient_checkpointing": True, "recompute_every": every}
        again = replace(kept, made=kept.made.model_copy(update=update))
        assert model_flops(again) == model_flops(kept)
        assert linear_flops(again) - linear_flops(kept) == pytest.approx(
            2 * kept.tokens * (kept.shape.linear + kept.adapter) / every
        )
        speeds.append(cost(again).tokens_per_second)
    assert speeds == sorted(speeds)
    assert speeds[-1] < cost(kept).tokens_per_second


def test_all_weights_cost_their_gradients_as_well() -> None:
    lora, full = (planned(MODELS["1B"], method, H100) for method in ("lora", "full"))
    assert lora is not None
    assert full is not None
    adapter = 6 * lora.adapter
    attention = 6 * 16 * 2048 * ROW
    frozen = model_flops(lora) / lora.tokens - adapter - attention
    assert model_flops(full) / full.tokens - attention == pytest.approx(1.5 * frozen)
    assert cost(full).tokens_per_second < cost(lora).tokens_per_second
