"""What an export takes: minutes, memory and disk, as the trainer itself predicts them.

`python -m hack.export_table FOLDER` writes it into docs/export.md below that folder. It is the
default `gguf: [F16, Q8_0, Q4_K_M]` with merged/ of a bfloat16 model, on 8 CPUs. The rates behind it
are measured (benchmarks/README.md, "Export"), the sums are not.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from finetune_trainer.contract import Export, Quantization, Training
from finetune_trainer.memory.forecast import (
    ExportWork,
    Machine,
    Widths,
    export_bytes,
    export_disk,
    forecast,
)
from finetune_trainer.model.shape import Shape
from hack.gpu_table import shape_of
from hack.stage_table import write_into

MODELS = {
    "1B": "Llama 3.2 1B",
    "8B": "Llama 3.1 8B",
    "32B": "Qwen3 32B",
    "70B": "Llama 3.3 70B",
}
CPUS = 8
EXPORT = Export()
GROUPS = {
    "fetch": ("fetch",),
    "merge, convert, quantize": ("merge", "write "),
    "gate": ("reference", "check ", "samples"),
}


def need_of(shape: Shape) -> int:
    """Bytes of memory beside mapped files."""
    widths = Widths(shape.vocabulary, shape.hidden, shape.mlp, shape.key_value, shape.layers)
    return export_bytes(widths, EXPORT, largest=shape.vocabulary * shape.hidden)


def minutes(shape: Shape, memory: float) -> dict[str, float]:
    """Of each group of GROUPS, and of the whole."""
    work = ExportWork(shape.parameters, EXPORT, own=Quantization.BF16)
    seconds = forecast(work, Machine(CPUS, memory))
    found = {
        group: sum(value for name, value in seconds.items() if name.startswith(begins)) / 60
        for group, begins in GROUPS.items()
    }
    return {**found, "all": sum(seconds.values()) / 60}


def said(value: float) -> str:
    """Minutes, or hours and minutes, to two digits."""
    if value >= 99.5:
        return f"{value / 60:.1f} h"
    return f"{max(1, round(value))} min"


def table() -> str:
    """Rows of Markdown, one for each model."""
    gate_slow = "gate in a pod without room for the model"
    heads = [
        *("model", "memory", "disk", "memory that holds the model"),
        *(*GROUPS, "all of it", gate_slow, "all of it there"),
    ]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for size, model in MODELS.items():
        shape = shape_of(model)
        need = need_of(shape)
        weights = 2 * shape.parameters
        disk = export_disk(shape, Training(), EXPORT, weights)
        fast, slow = minutes(shape, math.inf), minutes(shape, 0)
        cells = [
            f"{size} ({model})",
            f"{need / 2**30:.1f} GiB",
            f"{disk.total / 1e9:.0f} GB",
            f"{(need + weights) / 2**30:.0f} GiB",
            *(said(fast[group]) for group in GROUPS),
            said(fast["all"]),
            said(slow["gate"]),
            said(slow["all"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    write_into(Path(sys.argv[1]) / "docs" / "export.md", table())
