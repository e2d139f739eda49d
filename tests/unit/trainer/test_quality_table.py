"""The table of what was measured on GGUF files, as a terminal shows it."""

from __future__ import annotations

import re

from rich.console import Console

from finetune_trainer.contract import Artifact, Quality
from finetune_trainer.local import quality_table

GOOD = Quality(
    kl_divergence=0.001234, same_top_token=0.97654, perplexity=5.4321, max_kl_divergence=0.005
)
BAD = GOOD.model_copy(update={"kl_divergence": 0.4123, "passed": False})
OPEN = GOOD.model_copy(update={"max_kl_divergence": None})


def rows(*files: Artifact) -> dict[str, list[str]]:
    """The table's cells below its headings, by the first one."""
    table = quality_table(files)
    assert table is not None
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    lines = [re.split(r"\s{2,}", line.strip()) for line in capture.get().splitlines()]
    return {name: cells for name, *cells in lines if name.endswith(".gguf")}


def file(path: str, size: int = 1000, quality: Quality | None = None) -> Artifact:
    return Artifact(path=path, bytes=size, sha256="aa", quality=quality)


def test_each_gguf_file_has_a_row_the_largest_first() -> None:
    shown = rows(
        file("Modelfile"),
        file("gguf/m-LoRA-F32.gguf", 10),
        file("gguf/m-Q8_0.gguf", 145_000_000, GOOD),
        file("gguf/m-F16.gguf", 271_000_000, OPEN),
        file("merged/model.safetensors"),
    )
    assert shown == {
        "m-F16.gguf": ["271.0 MB", "0.00123 (none)", "97.7%", "5.432", "✓ passed"],
        "m-Q8_0.gguf": ["145.0 MB", "0.00123 (0.005)", "97.7%", "5.432", "✓ passed"],
        "m-LoRA-F32.gguf": ["10 bytes", "not measured"],
    }


def test_a_rejected_file_is_told_from_one_that_is_let_pass() -> None:
    shown = rows(
        file("gguf/a.gguf", quality=BAD),
        file("gguf/d.gguf", quality=GOOD.model_copy(update={"passed": False})),
        file("rejected/b.gguf", quality=BAD),
        file("rejected/c.gguf"),
    )
    assert [cells[-1] for cells in shown.values()] == [
        "✗ not good enough",
        "✗ not good enough",
        "✗ refused",
        "✗ refused",
    ]


def test_without_gguf_files_there_is_no_table() -> None:
    assert quality_table([file("adapter/adapter_model.safetensors")]) is None
