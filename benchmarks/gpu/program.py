"""Runs the cases in processes, writes gpu.json after each, and prints a table at the end."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.gpu import case_runner
from benchmarks.gpu.cases import Case, select
from benchmarks.gpu.outcome import Outcome, Verdict
from benchmarks.gpu.table import summary

POLL_SECONDS = 0.2
KEPT_SECONDS = 5  # of the budget, for the table
MODEL_BYTES = 40 << 30  # of memory for files, so that the models' files are made there


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    minutes: float
    cases: list[str]
    """Words; a case is run that has one of them in its name. None: all of them."""

    output: Path
    folder: Path | None
    tiny: bool


class Told(Exception):  # noqa: N818 - no error
    """A signal told the program to end."""


@dataclass
class Report:
    """What is known so far, and the file that holds it."""

    file: Path
    tiny: bool
    minutes: float
    began: float = field(default_factory=time.time)
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, found: dict[str, Any]) -> None:
        """Keep what a case found."""
        self.cases[name] = found
        self.write()

    def as_json(self, ended: str = "") -> dict[str, Any]:
        return {
            # Figures of the tiny form say nothing of any device: that its lines run, and no more.
            "tiny": self.tiny,
            "minutes": self.minutes,
            "seconds": time.time() - self.began,
            "ended": ended,
            "cases": self.cases,
        }

    def write(self, ended: str = "") -> None:
        """Write it whole, or not at all."""
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.as_json(ended), indent=2) + "\n", encoding="utf-8")
        partial.replace(self.file)


class Processes:
    """Runs cases in processes, until the deadline."""

    def __init__(self, folder: Path, report: Report, log: Path) -> None:
        self._folder, self._report, self._log = folder, report, log
        self._results = folder / "results.jsonl"
        self._deadline = report.began + 60 * report.minutes - KEPT_SECONDS
        # A fork has the libraries already, but CUDA doesn't survive one.
        self._context: Any = multiprocessing.get_context("fork" if report.tiny else "spawn")
        self._read = 0
        self._begun: str | None = None

    def run(self, cases: list[Case]) -> None:
        """One process for each group; a further one where one died of a case."""
        for _, group in groupby(cases, key=lambda case: case.group):
            left = list(group)
            while left:
                self._run_process(left)
                left = [case for case in left if case.name not in self._report.cases]

    def _run_process(self, cases: list[Case]) -> None:
        if time.time() >= self._deadline:
            for case in cases:
                self._end(case.name, Outcome.left_out("no time was left"))
            return
        order = case_runner.Order(
            cases=cases,
            folder=self._folder,
            results=self._results,
            log=self._log,
            tiny=self._report.tiny,
            deadline=self._deadline,
            parent=os.getpid(),
        )
        process = self._context.Process(target=case_runner.main, args=(order,))
        process.start()
        self._begun = None
        try:
            while process.is_alive() and time.time() < self._deadline:
                process.join(POLL_SECONDS)
                self._take()
        finally:
            late = process.is_alive()
            if late and process.pid:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.join()
            self._take()
        if late:
            self._end(self._begun or cases[0].name, Outcome.left_out("the time was up"))
        elif process.exitcode == case_runner.LOST:
            return  # its last case has said so; the others get a process of their own
        elif process.exitcode or any(case.name not in self._report.cases for case in cases):
            words = f"its process ended with status {process.exitcode}"
            left = next((c.name for c in cases if c.name not in self._report.cases), None)
            if left:
                self._end(self._begun or left, Outcome(Verdict.ERROR, words))

    def _take(self) -> None:
        """Read what the process has written since."""
        if not self._results.exists():
            return
        with self._results.open(encoding="utf-8") as stream:
            stream.seek(self._read)
            for line in iter(stream.readline, ""):
                if not line.endswith("\n"):
                    break
                self._read = stream.tell()
                found = json.loads(line)
                if "begun" in found:
                    self._begun = found["begun"]
                    continue
                self._begun = None
                self._show(found.pop("ended"), found)

    def _end(self, name: str, outcome: Outcome) -> None:
        self._show(name, outcome.as_json())

    def _show(self, name: str, found: dict[str, Any]) -> None:
        self._report.add(name, found)
        seconds = time.time() - self._report.began
        tiny = self._report.tiny and found["verdict"] == Verdict.MEASURED
        words = "it ran" if tiny else found["words"]
        print(f"{seconds:5.0f} s  {name}: {found['verdict']} ({words})", flush=True)


def run(options: Options) -> int:
    """Run it all. Status 1 where a case says wrong or did not come to an end."""
    if options.tiny:
        case_runner.prepare_environment(tiny=True)
        case_runner.load_libraries()  # once, for the forks
    report = Report(options.output, options.tiny, options.minutes)
    ended = "complete"
    with workspace(options.folder) as folder, told_by_signals():
        try:
            processes = Processes(folder, report, options.output.with_suffix(".log"))
            processes.run(select(options.cases))
        except Told as signal_name:
            ended = f"by {signal_name}"
    report.write(ended)
    print(summary(report.as_json(ended)), flush=True)
    wrong = {Verdict.FAILED, Verdict.ERROR}
    return int(ended != "complete" or any(c["verdict"] in wrong for c in report.cases.values()))


@contextmanager
def workspace(chosen: Path | None) -> Iterator[Path]:
    """A folder that is gone afterwards: in memory where there is much, else on disk."""
    memory = Path("/dev/shm")  # noqa: S108 - where Linux has it
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > MODEL_BYTES
    parent = chosen or (memory if roomy else None)
    if parent:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-", dir=parent) as folder:
        yield Path(folder)


@contextmanager
def told_by_signals() -> Iterator[None]:
    """SIGTERM and SIGINT end the run with what is there."""

    def tell(number: int, _: Any) -> None:
        raise Told(signal.Signals(number).name)

    before = {each: signal.signal(each, tell) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
