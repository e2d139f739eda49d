"""What the project is developed with: clusters, the demo, image builds, llama.cpp, the pins.

Here stands where things lie. What takes minutes to build goes to the user's cache folder, which
all checkouts share. The state of a running cluster (logs, data, process ids) lies in the checkout,
is ignored by git, and goes away with the cluster.
"""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def cache_dir() -> Path:
    """The cache folder shared by all checkouts of this user."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "finetune-operator"


def state_dir(name: str) -> Path:
    """The folder of one running cluster: everything in it may be removed with the cluster."""
    return REPOSITORY / ".state" / name
