"""The results as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.outcome import Verdict

HEADS = ("case", "verdict", "tokens/s", "MFU", "peak GiB", "predicted", "s", "what was found")
TINY = (
    "The tiny form: every line ran, and no figure here says anything of a device. "
    "No GPU has been measured."
)


def summary(report: Mapping[str, Any]) -> str:
    """The table, and ours against the others."""
    tiny = report["tiny"]
    rows = [HEADS, *(_row(name, found, tiny) for name, found in report["cases"].items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADS))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    lines[1:1] = ["-" * len(lines[0])]
    counts: dict[str, int] = {}
    for found in report["cases"].values():
        counts[found["verdict"]] = counts.get(found["verdict"], 0) + 1
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    lines += [
        "",
        *([] if tiny else ratios(report["cases"])),
        f"{told}; {report['seconds']:.0f} s, {report['ended']}",
    ]
    return "\n".join([*([TINY, ""] if tiny else []), *map(str.rstrip, lines)])


def _row(name: str, found: Mapping[str, Any], tiny: bool) -> tuple[str, ...]:
    measured = found["verdict"] == Verdict.MEASURED
    figures = {} if tiny else found["figures"]
    memory = figures.get("memory", {})
    return (
        name,
        found["verdict"],
        _number(figures.get("tokens_per_second"), "{:,.0f}"),
        _number(figures.get("mfu"), "{:.1%}"),
        _number(memory.get("peak_bytes"), "{:.1f}", 2**30),
        _number(memory.get("predicted_bytes"), "{:.1f}", 2**30),
        _number(found.get("took"), "{:.0f}"),
        "it ran" if tiny and measured else found["words"],
    )


def _number(value: float | None, form: str, unit: int = 1) -> str:
    return "" if value is None or value != value else form.format(value / unit)  # noqa: PLR0124


def ratios(cases: Mapping[str, Any]) -> list[str]:
    """Tokens a second of ours as a multiple of the others', on the same model and rows."""
    rates = {
        name: found["figures"]["tokens_per_second"]
        for name, found in cases.items()
        if "tokens_per_second" in found["figures"]
    }
    lines = []
    for name, rate in rates.items():
        rows, _, side = name.partition(": ")
        mine = rates.get(f"{rows}: ours")
        if mine and side != "ours":
            lines.append(f"{rows}: ours / {side} = {mine / rate:.2f} in tokens/s")
    return lines
