"""The table of docs/export.md says what the trainer predicts today."""

from __future__ import annotations

import math
from pathlib import Path

from hack.export_table import MODELS, minutes, need_of, table
from hack.gpu_table import shape_of
from hack.stage_table import BEGIN, END

PAGE = Path(__file__).parents[2] / "docs" / "export.md"


def test_the_page_has_the_table_of_today() -> None:
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert text.strip() == table(), "run `make generate`"
    assert len(text.strip().splitlines()) == 2 + len(MODELS)


def test_larger_models_take_more_and_the_longest_without_memory() -> None:
    shapes = [shape_of(model) for model in MODELS.values()]
    fast = [minutes(shape, math.inf)["all"] for shape in shapes]
    slow = [minutes(shape, 0)["all"] for shape in shapes]
    assert fast == sorted(fast)
    assert all(slower > faster for slower, faster in zip(slow, fast, strict=True))
    needs = [need_of(shape) for shape in shapes]
    assert needs == sorted(needs)
