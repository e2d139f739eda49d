"""Where things lie: what is kept between runs, and what belongs to one running cluster.

Built binaries are worth minutes of the user's time, so they live in the user's cache folder and
are shared by all checkouts. The state of a running cluster (logs, data, process ids) lives in the
checkout, is ignored by git, and goes away with the cluster.
"""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def cache_dir() -> Path:
    """The cache folder shared by all checkouts of this user."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "finetune-operator"


def state_dir(name: str) -> Path:
    """The folder of one running cluster: everything in it may be removed with the cluster."""
    return REPOSITORY / ".state" / name
