"""`make gpu` in its tiny form: every line of every case, so that none is new on a GPU.

It runs as a process of its own, and what it leaves is read as a user would.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.cases import CASES
from tests.fixtures import leave_out
from tests.integration.trainer.conftest import Processes

MUST_PASS = (
    "packed = alone",
    "each attention = alone",
    "checkpointing = none",
    "1 x 8 = 8 x 1",
    "fused = unfused head",
    "fused = plain adapters",
    "resumed = straight",
    "fused = plain AdamW",
    "qlora trains",
    "out of memory",
)
MAY_BE_LEFT_OUT = {"8b mixed: Unsloth", "1b mixed: Unsloth", "1b mixed: without Liger"}


def run(
    processes: Processes, module: str, folder: Path, *arguments: str
) -> tuple[int, str, dict[str, Any]]:
    with processes.popen(
        [sys.executable, "-m", module, "--tiny", f"--output={folder / 'gpu.json'}", *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        printed, _ = process.communicate(timeout=600)
    return process.returncode, printed, json.loads((folder / "gpu.json").read_text())


def test_every_case_runs_on_a_cpu(
    request: pytest.FixtureRequest, processes: Processes, tmp_path: Path
) -> None:
    if find_spec("triton") is None:
        leave_out(request.config, "triton isn't installed: run make build")
    code, printed, report = run(processes, "benchmarks.gpu", tmp_path)
    cases = report["cases"]
    log = (tmp_path / "gpu.log").read_text()
    assert code == 0, printed + log
    assert list(cases) == [case.name for case in CASES]
    assert report["ended"] == "complete"
    assert report["tiny"]

    verdicts = {name: found["verdict"] for name, found in cases.items()}
    assert {name for name, verdict in verdicts.items() if verdict == "left out"} <= MAY_BE_LEFT_OUT
    assert {verdicts[name] for name in MUST_PASS} == {"passed"}

    # A fault would have been seen, and what was compared was not the same thing twice.
    packed = cases["packed = alone"]["figures"]
    assert packed["control"] > 2 * packed["tolerance"] > 2 * packed["difference"] > 0
    assert cases["fused = unfused head"]["figures"]["difference"] > 0
    assert len(cases["fused = unfused head"]["figures"]["evaluations"][0]) == 2
    assert any("BatchHalved" in each for each in cases["out of memory"]["figures"]["notices"])
    assert cases["qlora trains"]["figures"]["weights_in_4_bits"] > 0
    memory = cases["8b memory, 1 row"]["figures"]["memory"]
    assert memory["peak_bytes"] > 0
    assert memory["predicted_bytes"] > 0

    # Each training says what made it fast, and what it was expected to reach on an H100.
    ours = cases["1b mixed: ours"]["figures"]
    assert ours["levers"] == {"use_liger": False, "fuse_adapters": False}
    assert ours["predicted_tokens_per_second"] > 0
    assert cases["device"]["figures"]["trainer_sees"]

    # What ran on a CPU is no figure of a device.
    assert "No GPU has been measured" in printed
    assert "tokens/s =" not in printed
    assert all(case.name in printed for case in CASES)


def test_stopped_early_it_leaves_what_it_has(processes: Processes, tmp_path: Path) -> None:
    code, printed, report = run(processes, "tests.integration.trainer.stopped_benchmark", tmp_path)
    assert code == 1
    assert report["ended"] == "by SIGTERM"
    verdicts = {name: found["verdict"] for name, found in report["cases"].items()}
    broken = dict.fromkeys(("lacks", "dies", "breaks"), "ERROR")
    assert verdicts == {"device": "measured", **broken, "after it": "measured"}
    assert "No module named" in report["cases"]["lacks"]["words"]
    assert "illegal memory access" in report["cases"]["breaks"]["words"]
    assert "its process ended with status 3" in report["cases"]["dies"]["words"]
    assert "device" in printed
    assert "by SIGTERM" in printed
