"""Follows a FineTuneJob to its end: a progress bar per stage, or a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

POLL_SECONDS = 1.0
PLAIN_INTERVAL_SECONDS = 15.0
STAGES = ("prepare", "train", "export")
TERMINAL = ("Succeeded", "Failed")

Job = dict[str, Any]


def stage_of(job: Job, name: str) -> dict[str, Any]:
    """The entry of one stage in the status; empty when there is none yet."""
    stages = job.get("status", {}).get("stages", [])
    return next((stage for stage in stages if stage["name"] == name), {})


def ready_message(job: Job) -> str:
    """Why the job is not ready: reason and message of its Ready condition."""
    conditions = job.get("status", {}).get("conditions", [])
    ready: dict[str, str] = next((c for c in conditions if c["type"] == "Ready"), {})
    return f"{ready.get('reason')}: {ready.get('message')}"


def is_finished(job: Job) -> bool:
    """Whether the current spec has been worked off, one way or the other."""
    status = job.get("status", {})
    current = status.get("observedGeneration") == job["metadata"]["generation"]
    return current and status.get("phase") in TERMINAL


def poll(read: Callable[[], Job], timeout: float) -> Iterator[Job]:
    """Yield the job every second until it is finished; raises TimeoutError with its status."""
    deadline = time.monotonic() + timeout
    while True:
        job = read()
        yield job
        if is_finished(job):
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"not finished after {timeout:.0f} s: {job.get('status')}")
        time.sleep(POLL_SECONDS)


def follow(read: Callable[[], Job], console: Console, timeout: float) -> Job:
    """Show the job's progress until it is finished and return it as it is then."""
    show = _bars if console.is_terminal else _lines
    return show(poll(read, timeout), console)


def _bars(jobs: Iterator[Job], console: Console) -> Job:
    columns = (
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description:8}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
    )
    job: Job = {}
    with Progress(*columns, console=console) as progress:
        tasks = {
            name: progress.add_task(name, total=100, start=False, detail="") for name in STAGES
        }
        for job in jobs:
            for name, task in tasks.items():
                _update(progress, task, job, name)
    return job


def _update(progress: Progress, task: TaskID, job: Job, name: str) -> None:
    state = stage_of(job, name).get("state")
    if state in {"Running", "Succeeded"} and not progress.tasks[task].started:
        progress.start_task(task)
    if state == "Succeeded":
        progress.update(task, completed=100, detail=detail(job, name))
        progress.stop_task(task)
    elif state is not None:
        progress.update(task, completed=percent(job, name), detail=detail(job, name))


def _lines(jobs: Iterator[Job], console: Console) -> Job:
    job: Job = {}
    said: dict[str, str] = {}
    spoken = float("-inf")
    for job in jobs:
        states = {name: stage_of(job, name).get("state", "") for name in STAGES}
        changed = states != said
        if not changed and time.monotonic() - spoken < PLAIN_INTERVAL_SECONDS:
            continue
        for name in STAGES:
            running = states[name] == "Running"
            if states[name] and (running or states[name] != said.get(name)):
                text = (
                    f"  {name:8} {states[name]:10} {percent(job, name):3.0f}% {detail(job, name)}"
                )
                console.print(text, markup=False, highlight=False, soft_wrap=True)
        said, spoken = states, time.monotonic()
    return job


def percent(job: Job, name: str) -> float:
    """How much of a stage is done, 0 to 100."""
    if stage_of(job, name).get("state") == "Succeeded":
        return 100
    progress = job.get("status", {}).get("progress") or {}
    if progress.get("stage") != name:
        return 0
    return float(str(progress.get("percent") or "0%").rstrip("%"))


def detail(job: Job, name: str) -> str:
    """What is worth saying about a stage in half a line."""
    stage = stage_of(job, name)
    if stage.get("cached"):
        return "cached: the bucket holds it already"
    if stage.get("state") in {"Failed", "Pending"}:
        return str(stage.get("message") or "")
    progress = job.get("status", {}).get("progress") or {}
    if progress.get("stage") != name:
        return ""
    parts = []
    if progress.get("totalSteps"):
        parts.append(f"step {progress.get('step', 0)}/{progress['totalSteps']}")
    if name == "train" and progress.get("loss") is not None:
        parts.append(f"loss {progress['loss']:.3f}")
    if stage.get("state") == "Running" and progress.get("eta"):
        parts.append(f"ETA {progress['eta']}")
    if progress.get("message"):
        parts.append(str(progress["message"]))
    return ", ".join(parts)
