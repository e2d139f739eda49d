"""Texts that tell whether two tokenizers are the same."""

from __future__ import annotations

PROBES = (
    "3 33 333 3333 33333 1,234.56 2026-11-24",
    "I've said it'd WORK; they'LL see. (Don't [stop]!) a_b-c/d == 'x' && \"y\"",
    "one  two   three\n\nfour\n\n\nfive\tsix\n  seven",
    "Zürich, naïve café, señor, Привет мир, Ελλάδα, 你好世界, こんにちは, 한국어, ١٢٣",
    "🙂 👩‍👩‍👧 ✓ → ≤ ½ € ™",
)
"""Texts at which the ways to split text before tokenizing differ: numbers, contractions, white
space, scripts, emoji. A handful of rows may contain none of these."""
