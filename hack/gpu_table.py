"""Which GPU trains which model: what the planner says, written as a table.

`python -m hack.gpu_table FOLDER` writes it into docs/training.md below that folder. Widths are
those of the models' own config.json (tests/data/models, which tests compare with transformers).
Nothing in it is measured.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer.contract import Hardware, StageError, Training, TrainingPlan
from finetune_trainer.memory.plan import Lengths, plan
from finetune_trainer.model.shape import Shape, number_type
from hack.stage_table import write_into

FOLDER = Path(__file__).parents[1] / "tests" / "data" / "models"
MODELS = {
    "Llama 3.2 1B": "llama-3.2-1b",
    "Llama 3.2 3B": "llama-3.2-3b",
    "Gemma 3 4B": "gemma-3-4b",
    "Mistral 7B": "mistral-7b-v0.3",
    "Llama 3.1 8B": "llama-3.1-8b",
    "Qwen3 32B": "qwen3-32b",
    "Llama 3.3 70B": "llama-3.3-70b",
}
METHODS = ("lora", "qlora", "full")
ROW = 2048  # tokens
SEVERAL = (2, 4, 8)  # GPUs that share a model


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet."""

    name: str
    mebibytes: int
    """As the driver reports it, and with it the nodes' label nvidia.com/gpu.memory."""

    capability: tuple[int, int]
    sixteen: float
    """Operations a second of the tensor cores in 16 bits, without sparsity."""

    single: float
    """The same in float32."""

    bandwidth: float
    """Bytes a second."""

    def hardware(self, count: int) -> Hardware:
        return Hardware(gpus=count, gpu_memory_bytes=self.mebibytes << 20)


CARDS = (
    Card("T4", 15_360, (7, 5), 65e12, 8.1e12, 0.32e12),
    Card("L4", 23_034, (8, 9), 121e12, 30.3e12, 0.3e12),
    Card("A10G", 23_028, (8, 6), 70e12, 31.2e12, 0.6e12),
    Card("A100 40 GB", 40_960, (8, 0), 312e12, 19.5e12, 1.555e12),
    Card("H100 80 GB", 81_559, (9, 0), 989e12, 67e12, 3.35e12),
)


def shape_of(model: str) -> Shape:
    """The widths of one of MODELS."""
    found = Shape.from_config(json.loads((FOLDER / f"{MODELS[model]}.json").read_bytes()))
    if found is None:
        raise ValueError(f"the widths of {model} can't be read")
    return found


def planned(shape: Shape, method: str, card: Card, count: int = 1) -> TrainingPlan | None:
    """How the defaults of spec.training are split; None where nothing fits."""
    training = Training.model_validate({"method": method})
    try:
        return plan(
            training,
            shape,
            Lengths(ROW),
            card.hardware(count),
            half=computes_in_16_bits(shape, card),
        )
    except StageError:
        return None


def computes_in_16_bits(shape: Shape, card: Card) -> bool:
    return number_type(card.capability, shape.model_type) != "float32"


REACHED = 0.4
"""Share of the peak: the best published figures of LoRA on one H100 are 40.6 to 42.8%. A T4 and
short passes reach less."""

UNPACKED = 3 * (0.5 + 2 * 2)
"""Bytes a weight that 4-bit layers take more for a pass: read, written and read again in 16 bits,
forward, backward and again where the pass is recomputed."""


def tokens_per_second(shape: Shape, method: str, made: TrainingPlan, card: Card) -> float:
    """What one GPU should do: 4 operations a token for each frozen weight, 6 for one that is
    trained, 2 more for recomputation (the usual count, e.g. arXiv:2001.08361)."""
    weights = shape.linear + shape.vocabulary * shape.hidden
    operations = (6 if method == "full" else 4) + 2 * made.gradient_checkpointing
    peak = card.sixteen if computes_in_16_bits(shape, card) else card.single
    tokens = made.batch_size * ROW
    seconds = operations * weights * tokens / (REACHED * peak)
    if method == "qlora":
        seconds += UNPACKED * shape.linear / card.bandwidth
    return tokens / seconds


def cell(shape: Shape, method: str, card: Card) -> str:
    """Rows a pass and tokens a second; or how many such GPUs it takes."""
    made = planned(shape, method, card)
    if made is not None:
        mark = "\\*" if made.gradient_checkpointing else ""
        rate = tokens_per_second(shape, method, made, card)
        return f"{made.batch_size}{mark} · {float(f'{rate:.2g}'):,.0f}"
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
