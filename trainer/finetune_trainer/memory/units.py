"""Bytes for people, in the units that Kubernetes writes."""

from __future__ import annotations

import math

GIB = 2**30
MIB = 2**20


def binary(count: int, *, up: bool = False) -> str:
    """E.g. 6.1 GiB or 84 MiB; with `up` rounded up, as a limit that is enough: 7Gi or 84Mi."""
    if up:
        return f"{math.ceil(count / GIB)}Gi" if count >= GIB else f"{math.ceil(count / MIB)}Mi"
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"
