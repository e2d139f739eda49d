"""How figures are written, the same on the page and in the card."""

from __future__ import annotations

import math
from typing import Any

NOTHING = "–"  # noqa: RUF001 - a dash where there is no figure


def loss(value: float | None) -> str:
    """A loss in nats per token, as 1.812."""
    if value is None:
        return NOTHING
    return f"{value:.3f}" if math.isfinite(value) else "not finite"


def perplexity(value: float | None) -> str:
    """A perplexity, as 6.12 or 1,234."""
    if value is None:
        return NOTHING
    if not math.isfinite(value) or value >= 1e6:
        return "over a million"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def divergence(value: float | None) -> str:
    """A KL divergence in nats per token, as 0.0313."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "not finite"
    if 0 <= value < 1e-5:
        return "under 0.00001"
    return f"{value:.5f}" if value < 0.001 else f"{value:.4f}"


def share(value: float | None) -> str:
    """A share from 0 to 1, as 97.7%."""
    return NOTHING if value is None else f"{value:.1%}"


def count(value: float | None) -> str:
    """A whole number, as 1,234,567."""
    return NOTHING if value is None else f"{value:,.0f}"


def setting(value: Any) -> str:
    """A value of the spec, spelled as in the spec."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(setting(item) for item in value) or "none"
    return "none" if value is None else str(value)
