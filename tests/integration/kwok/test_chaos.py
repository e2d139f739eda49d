"""The short form of `make chaos`, and its end by Ctrl-C."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from hack import REPOSITORY
from hack.chaos.__main__ import INTERRUPTED, figures
from hack.chaos.course import Run
from hack.kwok.cluster import KwokCluster
from hack.process import wait_until

JOBS, FAULTS = 20, 30
START_SECONDS = 120


def test_the_operator_keeps_its_promises_on_a_bad_day(
    kwok_cluster: KwokCluster, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randint(1, 99999)
    outcome = Run(kwok_cluster, tmp_path, jobs=JOBS, faults=FAULTS, seed=seed)()
    told = figures(outcome)
    assert not outcome.findings.broken, told
    assert outcome.faults.total() > FAULTS // 2, told
    assert outcome.met.total(), told


@pytest.mark.usefixtures("kwok_cluster")  # where there is no kwok, there is no chaos
def test_ctrl_c_ends_it_and_all_that_it_has_started(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hack.chaos", "--jobs", "5", "--faults", "500"]
    with (tmp_path / "output").open("w") as sink:
        chaos = subprocess.Popen(command, cwd=REPOSITORY, stdout=sink, stderr=sink)
        started = psutil.Process(chaos.pid)

        def runs() -> bool:
            assert chaos.poll() is None, (tmp_path / "output").read_text()
            return any("finetune_operator.main" in words(each) for each in started.children())

        try:
            wait_until(runs, what="the operator of the chaos", seconds=START_SECONDS)
            children = started.children(recursive=True)
            chaos.send_signal(signal.SIGINT)
            code = chaos.wait(timeout=60)
        finally:
            chaos.kill()
            chaos.wait()
    assert code == INTERRUPTED, (tmp_path / "output").read_text()
    assert len(children) > 5
    assert not psutil.wait_procs(children, timeout=10)[1]


def words(process: psutil.Process) -> list[str]:
    """Its command line; none of a process that is just coming or going."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []
