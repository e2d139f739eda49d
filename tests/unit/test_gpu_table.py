"""The table of docs/training.md says what the planner says today."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hack.gpu_table import CARDS, METHODS, MODELS, cell, planned, shape_of, table, tokens_per_second
from hack.stage_table import BEGIN, END

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
BY_NAME = {card.name: card for card in CARDS}


def test_the_page_has_the_table_of_today() -> None:
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert text.strip() == table(), "run `make generate`"
    assert len(text.strip().splitlines()) == 2 + len(MODELS) * len(METHODS)


@pytest.mark.parametrize(
    ("model", "method", "card", "fits"),
    [
        ("Llama 3.2 1B", "lora", "T4", r"4\\\* · [\d,]+"),
        ("Llama 3.1 8B", "lora", "L4", r"2\\\* · [\d,]+"),
        ("Llama 3.1 8B", "lora", "T4", "2 GPUs"),
        ("Llama 3.1 8B", "qlora", "T4", r"4\\\* · [\d,]+"),
        ("Llama 3.2 1B", "full", "A100 40 GB", r"4\\\* · [\d,]+"),
        ("Llama 3.1 8B", "full", "H100 80 GB", "2 GPUs"),
        ("Llama 3.3 70B", "full", "H100 80 GB", "–"),  # noqa: RUF001 - a dash
    ],
)
def test_a_cell_says_whether_it_fits(model: str, method: str, card: str, fits: str) -> None:
    assert re.fullmatch(fits, cell(shape_of(model), method, BY_NAME[card]))


def test_what_is_slower_is_said_to_be() -> None:
    shape, card = shape_of("Llama 3.2 1B"), BY_NAME["H100 80 GB"]
    made = planned(shape, "lora", card)
    assert made is not None
    again = made.model_copy(update={"gradient_checkpointing": True})
    rate = tokens_per_second(shape, "lora", made, card)
    assert tokens_per_second(shape, "lora", again, card) == pytest.approx(rate * 4 / 6)
    assert tokens_per_second(shape, "full", made, card) == pytest.approx(rate * 4 / 6)
    assert tokens_per_second(shape, "qlora", made, card) < rate
    assert tokens_per_second(shape, "lora", made, BY_NAME["L4"]) < rate / 5
    # Gemma's activations pass what float16 can hold, and a T4 has no bfloat16.
    gemma, old = shape_of("Gemma 3 4B"), BY_NAME["T4"]
    slow = tokens_per_second(gemma, "qlora", made, old)
    assert slow < tokens_per_second(shape_of("Llama 3.2 3B"), "qlora", made, old) / 5
