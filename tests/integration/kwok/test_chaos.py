"""The short form of `make chaos`."""

from __future__ import annotations

import random
from pathlib import Path

from hack.chaos.__main__ import figures
from hack.chaos.course import Run
from hack.kwok.cluster import KwokCluster

JOBS, FAULTS = 20, 30


def test_the_operator_keeps_its_promises_on_a_bad_day(
    kwok_cluster: KwokCluster, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randint(1, 99999)
    outcome = Run(kwok_cluster, tmp_path, jobs=JOBS, faults=FAULTS, seed=seed)()
    told = figures(outcome)
    assert not outcome.findings.broken, told
    assert outcome.faults.total() > FAULTS // 2, told
