"""The memory of a training's process on this machine, predicted and measured."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_prediction_is_within_a_fifth_of_what_is_measured(smollm2_folder: Path) -> None:
    assert smollm2_folder.is_dir()  # the benchmark's model, made once
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--quick"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    errors = [float(error) for error in re.findall(r"([+-][0-9.]+)% \|$", done.stdout, re.M)]
    assert len(errors) == 2, done.stdout
    assert all(abs(error) < 20 for error in errors), done.stdout
