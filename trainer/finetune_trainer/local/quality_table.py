"""The table of what was measured on each GGUF file, for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import PurePosixPath

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from finetune_trainer.contract import Artifact, Quality
from finetune_trainer.contract.verdict_words import Statement, Tone, word_for

TITLE = "GGUF files against what they were made of"
WIDTH = 120  # of a log, which has none of its own
_MARKS = {Tone.GOOD: ("✓ ", "green"), Tone.BAD: ("✗ ", "red")}


def show_quality(artifacts: Sequence[Artifact]) -> None:
    """Print the table, where there is something to show."""
    table = quality_table(artifacts)
    if table is not None:
        Console(width=None if sys.stdout.isatty() else WIDTH).print(table)


def quality_table(artifacts: Sequence[Artifact]) -> Table | None:
    """One row for each GGUF file, the largest first; None where there is none."""
    files = [each for each in artifacts if each.path.endswith(".gguf")]
    if not files:
        return None
    table = Table(title=TITLE, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("File", overflow="fold")
    for heading in ("Size", "KL (limit)", "Same top token", "Perplexity"):
        table.add_column(heading, justify="right")
    table.add_column("Verdict")
    for file in sorted(files, key=lambda each: -each.bytes):
        name = PurePosixPath(file.path).name
        table.add_row(name, decimal(file.bytes), *_figures(file.quality), _marked(word_for(file)))
    return table


def _figures(quality: Quality | None) -> tuple[str, str, str]:
    if quality is None:
        return "", "", ""
    limit = quality.max_kl_divergence
    return (
        f"{quality.kl_divergence:.3g} ({'none' if limit is None else f'{limit:.3g}'})",
        f"{quality.same_top_token:.1%}",
        f"{quality.perplexity:.4g}",
    )


def _marked(verdict: Statement) -> str:
    mark, colour = _MARKS.get(verdict.tone, ("", "none"))
    return f"[{colour}]{mark}{verdict.text}[/]"
