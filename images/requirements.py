#!/usr/bin/env python3
"""Print the requirements of extras of pyproject.toml (trainer,trackers), one a line.

An image's build installs these in a layer of their own, before the project's code is there, so
that a change of code leaves the gigabyte below it alone.
"""

from __future__ import annotations

import itertools
import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: str) -> list[str]:
    """List what the package itself and its extras ask for."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    groups = [project["optional-dependencies"][name] for name in extras.split(",")]
    return sorted({*project["dependencies"], *itertools.chain(*groups)})


if __name__ == "__main__":
    print("\n".join(requirements(Path(sys.argv[1]), sys.argv[2])))
