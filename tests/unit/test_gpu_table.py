"""The table of docs/training.md says what the planner says today."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hack.gpu_table import CARDS, METHODS, MODELS, cell, shape_of, table
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
    def rate(model: str, method: str, card: str) -> float:
        found = re.fullmatch(r".* · ([\d,]+)", cell(shape_of(model), method, BY_NAME[card]))
        assert found is not None
        return float(found[1].replace(",", ""))

    fast = rate("Llama 3.2 1B", "lora", "H100 80 GB")
    assert rate("Llama 3.2 1B", "full", "H100 80 GB") < fast
    assert rate("Llama 3.2 1B", "lora", "L4") < fast / 5
    # Gemma's activations pass what float16 can hold, and a T4 has no bfloat16.
    assert rate("Gemma 3 4B", "qlora", "T4") < rate("Llama 3.2 3B", "qlora", "T4") / 5
