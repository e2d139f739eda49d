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


def offer_to_image(llama: LlamaCpp, folder: Path) -> None:
    """Put both into a build's images/trainer/wheels; it takes them only if they fit its base."""
    wheel = folder / "wheels" / llama.wheel.parent.name / llama.wheel.name
    wheel.parent.mkdir(parents=True)
    shutil.copy(llama.wheel, wheel)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(llama.converter, folder / llama.converter.name, ignore=ignore)
