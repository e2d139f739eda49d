"""Which GPU trains which model: what the planner and the model of the cost say, as a table.

`python -m hack.gpu_table FOLDER` writes it into docs/training.md below that folder. Widths are
those of the models' own config.json (tests/data/models, which tests compare with transformers).
Tokens a second are those of benchmarks/speed_model.py, without Liger's kernels. Nothing in it is
measured.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.speed_model import H100, L4, Device, cost, planned, rounded
from finetune_trainer.model.shape import Shape
from hack.stage_table import write_into

FOLDER = Path(__file__).parents[1] / "tests" / "data" / "models"
MODELS = {
    "Llama 3.2 1B": "llama-3.2-1b",
    "Llama 3.2 3B": "llama-3.2-3b",
    "Gemma 3 4B": "gemma-3-4b",
    "Mistral 7B": "mistral-7b-v0.3",
    "Llama 3.1 8B": "llama-3.1-8b",
    "Qwen3 32B": "qwen3-32b",
    "Qwen3 30B A3B": "qwen3-30b-a3b",
    "Mixtral 8x7B": "mixtral-8x7b",
    "Llama 3.3 70B": "llama-3.3-70b",
}
METHODS = ("lora", "qlora", "full")
SEVERAL = (2, 4, 8)  # GPUs that share a model
CARDS = (
    # A T4 has no FlashAttention 2; PyTorch's other kernel takes a mask.
    Device("T4", 15_360, (7, 5), 65e12, 8.1e12, 0.32e12, 8e9, 0.3),
    replace(L4, name="L4"),
    Device("A10G", 23_028, (8, 6), 70e12, 31.2e12, 0.6e12, 32e9, 0.5),
    Device("A100 40 GB", 40_960, (8, 0), 312e12, 19.5e12, 1.555e12, 300e9, 0.6),
    replace(H100, name="H100 80 GB"),
)


def shape_of(model: str) -> Shape:
    """The widths of one of MODELS."""
    found = Shape.from_config(json.loads((FOLDER / f"{MODELS[model]}.json").read_bytes()))
    if found is None:
        raise ValueError(f"the widths of {model} can't be read")
    return found


def cell(shape: Shape, method: str, card: Device) -> str:
    """Rows a pass and tokens a second; or how many such GPUs it takes."""
    setup = planned(shape, method, card)
    if setup is not None:
        mark = "\\*" if setup.recomputed else ""
        return f"{setup.made.batch_size}{mark} · {rounded(cost(setup).tokens_per_second)}"
    enough = next((n for n in SEVERAL if planned(shape, method, card, n)), None)
    return f"{enough} GPUs" if enough else "–"  # noqa: RUF001 - a dash where nothing fits


def table() -> str:
    """Rows of Markdown: a model and a method each."""
    names = " | ".join(card.name for card in CARDS)
    lines = [f"| model | method | {names} |", "| --- | --- |" + " --- |" * len(CARDS)]
    for model in MODELS:
        shape = shape_of(model)
        for method in METHODS:
            cells = " | ".join(cell(shape, method, card) for card in CARDS)
            lines.append(f"| {model if method == METHODS[0] else ''} | {method} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    write_into(Path(sys.argv[1]) / "docs" / "training.md", table())
