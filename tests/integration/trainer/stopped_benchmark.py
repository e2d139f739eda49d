"""`make gpu` with cases that end their process or break the device, and one that stops it all."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, NoReturn

from benchmarks.gpu import case_runner, cases
from benchmarks.gpu.__main__ import main


def die(bench: Any) -> NoReturn:
    del bench
    os._exit(3)


def break_device(bench: Any) -> NoReturn:
    """As a kernel that reads where it may not."""
    del bench
    case_runner.device_is_lost = lambda: True
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def stop_all(bench: Any) -> NoReturn:
    """As a user's Ctrl-C or the end of a lease, while a case runs."""
    del bench
    os.kill(os.getppid(), signal.SIGTERM)
    while True:
        signal.pause()


MISSING = "a_module_that_this_machine_lacks"
OWN = "tests.integration.trainer.stopped_benchmark"

if __name__ == "__main__":
    case_runner.HEAVY = (MISSING, *case_runner.HEAVY)
    cases.CASES = (
        cases.case("device", "first", 1, "benchmarks.gpu.speed:device"),
        cases.case("lacks", "first", 1, f"{MISSING}:run"),
        cases.case("dies", "first", 1, f"{OWN}:die"),
        cases.case("breaks", "first", 1, f"{OWN}:break_device"),
        cases.case("after it", "first", 1, "benchmarks.gpu.speed:device"),
        cases.case("stops", "first", 1, f"{OWN}:stop_all"),
        cases.case("never", "second", 1, "benchmarks.gpu.speed:device"),
    )
    sys.exit(main())
