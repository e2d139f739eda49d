"""The process that runs the cases of one group, one after the other.

It appends a JSON line when a case begins and when it ends, so that whatever ends this process, what
was found is known. Libraries are imported in functions: the environment, and Unsloth where it runs,
have to be there first.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import Case
from benchmarks.gpu.outcome import Outcome, Verdict
from finetune_trainer.runtime import child

LOST = 75
"""Exit status of a process whose device computes nothing any more: a new one runs what is left."""

HEAVY: tuple[str, ...] = ("benchmarks.gpu.checks", "benchmarks.gpu.speed", "benchmarks.gpu.ladder")


@dataclass(frozen=True)
class Order:
    """What a process is to run."""

    cases: Sequence[Case]
    folder: Path
    results: Path
    """JSON lines."""

    log: Path
    tiny: bool
    deadline: float
    """On the clock of `time.time`, which all processes share."""

    parent: int


def main(order: Order) -> None:
    """Run the cases, in a process group of this process's own."""
    os.setsid()
    child.die_with_parent(order.parent)
    with order.log.open("a", buffering=1) as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        prepare_environment(order.tiny)
        with writing(order.results) as write:
            run_cases(order, write)


def prepare_environment(tiny: bool) -> None:
    """Before the libraries are loaded. A CPU interprets Triton's kernels, in the tiny form."""
    from finetune_trainer.runtime.lifecycle import set_up_libraries  # noqa: PLC0415

    if tiny:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(name, "1")
    set_up_libraries()


def run_cases(order: Order, write: Any) -> None:
    """Each with its own end, whatever that is."""
    unsloth = order.cases[0].group.startswith("unsloth")
    if unsloth:
        import_unsloth(order.folder)
    load_libraries()  # not before: Unsloth has to be loaded first
    gc.collect()
    gc.freeze()  # or each training would look through all libraries for what can go
    from benchmarks.gpu.models import Scale  # noqa: PLC0415
    from benchmarks.gpu.trainings import Bench  # noqa: PLC0415

    bench = Bench(order.folder, Scale.smallest() if order.tiny else Scale.full())
    for case in order.cases:
        if time.time() + case.seconds * (not order.tiny) > order.deadline:
            write({"ended": case.name, **Outcome.left_out("no time was left").as_json()})
            continue
        write({"begun": case.name})
        began = time.monotonic()
        outcome = run_case(bench, case)
        write({"ended": case.name, "took": time.monotonic() - began, **outcome.as_json()})
        if outcome.verdict is Verdict.ERROR and device_is_lost():
            sys.exit(LOST)


def load_libraries() -> None:
    """With the modules of the cases. Where one can't be loaded, the cases that need it say why."""
    for module in HEAVY:
        try:
            importlib.import_module(module)
        except Exception:  # of whatever machine this is
            traceback.print_exc()


def device_is_lost() -> bool:
    """Whether CUDA has had an error after which everything fails in this process."""
    import torch  # noqa: PLC0415

    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call] # torch
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def run_case(bench: Any, case: Case) -> Outcome:
    """What the case found, or the error that ended it."""
    from benchmarks.gpu.trainings import free_memory  # noqa: PLC0415

    print(f"=== {case.name}", flush=True)
    module, _, function = case.function.partition(":")
    try:
        run = getattr(importlib.import_module(module), function)
        found: Outcome = run(bench, **dict(case.options))
    except Exception as error:  # the edge: the cases after it are run all the same
        traceback.print_exc()
        first = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        with suppress(RuntimeError):  # of a device that computes nothing any more
            free_memory()
        return Outcome(Verdict.ERROR, f"{first:.160}", {"traceback": traceback.format_exc()})
    print(f"--- {found.verdict}: {found.words}", flush=True)
    return found


def import_unsloth(folder: Path) -> None:
    """Ahead of the libraries that it changes; where it can't be, its cases say why."""
    from finetune_trainer.train.recipe import unsloth_engine  # noqa: PLC0415
    from finetune_trainer.train.supervisor.setup import missing_for_unsloth  # noqa: PLC0415

    if missing_for_unsloth() is None:
        try:
            unsloth_engine.import_first(folder)
        except unsloth_engine.UnslothFailedError:
            traceback.print_exc()


@contextmanager
def writing(file: Path) -> Iterator[Any]:
    """A function that appends one object to a file of JSON lines."""
    with file.open("a", encoding="utf-8") as stream:

        def write(line: dict[str, Any]) -> None:
            stream.write(json.dumps(line) + "\n")
            stream.flush()

        yield write
