"""`python -m hack.constraints`: pin the whole set that each extra installs, in constraints/*.txt.

The pins that still fit are kept; with `--upgrade` the newest versions that pyproject allows are
taken. Only names and versions are written, never where a file came from.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from hack import REPOSITORY

FOLDER = REPOSITORY / "constraints"
EXTRAS = {
    "operator": "operator",
    "cli": "cli",
    "trainer": "trainer,gguf,trackers,signing",
    "unsloth": "trainer,gguf,trackers,signing,liger,unsloth",
    "dev": "operator,cli,trainer,gguf,trackers,signing,dev,docs,integration",
}


def resolve(extras: str, pins: Path | None) -> dict[str, str]:
    """Ask pip what it would install; maps names to public versions (2.13.0, not 2.13.0+cpu)."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    command += ["--report", "-", f"{REPOSITORY}[{extras}]"]
    if pins is not None:
        command += ["--constraint", str(pins)]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    found = {item["metadata"]["name"]: item["metadata"]["version"] for item in report["install"]}
    found.pop("finetune-operator")
    found.pop("triton", None)  # pinned in pyproject.toml; CUDA builds of torch ask for it
    return {name: version.partition("+")[0] for name, version in found.items()}


def main(
    upgrade: Annotated[bool, typer.Option("--upgrade", help="Take the newest versions.")] = False,
) -> None:
    """Pin the whole set that each extra installs, in constraints/*.txt; it takes minutes."""
    # The widest set first: the images then get exactly what the tests ran with.
    everything = FOLDER / "dev.txt"
    keep = everything.exists() and not upgrade
    for name, extras in sorted(EXTRAS.items()):
        pins = everything if keep or name != "dev" else None
        versions = resolve(extras, pins)
        lines = [f"{package}=={versions[package]}" for package in sorted(versions, key=str.lower)]
        (FOLDER / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
