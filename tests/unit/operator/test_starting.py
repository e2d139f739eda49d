"""What the operator remembers of the Jobs that it has started."""

from __future__ import annotations

import time

import pytest

from finetune_operator.starting import _remember


def test_what_is_too_old_to_count_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many namespaces and kinds of Jobs there were; what comes again stays."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    times = dict[int, float]()
    for now in range(1000):
        _remember(times, now, 60)
        _remember(times, -1, 60)
        assert len(times) <= 61
    assert times == {-1: 999, **{at: at for at in range(940, 1000)}}
