"""llama.cpp for tests and images: what `images/trainer/llama_cpp.py` makes, run from here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.errors import CommandFailed
from tests.cluster.paths import REPOSITORY, cache_dir

SCRIPT = REPOSITORY / "images" / "trainer" / "llama_cpp.py"
PREBUILT = REPOSITORY / "images" / "trainer" / "wheels"
"""Ignored by git; the trainer image's build looks here before it compiles."""


@dataclass(frozen=True)
class LlamaCpp:
    """The converter's folder (LLAMA_CPP_DIR) and the wheel that quantizes and loads."""

    converter: Path
    wheel: Path


def get_llama_cpp() -> LlamaCpp:
    """Return both, building the wheel on first use (5 minutes on 2 cores, with progress shown)."""
    command = [sys.executable, str(SCRIPT), "--cache", str(cache_dir())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise CommandFailed(command, done.returncode, "the message is above")
    places = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    return LlamaCpp(Path(places["converter"]), Path(places["wheel"]))


def offer_to_image(llama: LlamaCpp, prebuilt: Path = PREBUILT) -> None:
    """Put both where the image's build finds them; it takes them only if they fit its base."""
    wheel = prebuilt / "wheels" / llama.wheel.parent.name / llama.wheel.name
    converter = prebuilt / llama.converter.name
    if wheel.exists() and converter.exists():
        return
    shutil.rmtree(prebuilt, ignore_errors=True)
    wheel.parent.mkdir(parents=True)
    shutil.copy2(llama.wheel, wheel)
    shutil.copytree(llama.converter, converter, ignore=shutil.ignore_patterns("__pycache__"))
