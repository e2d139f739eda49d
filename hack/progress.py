"""Says what a long step is doing: a live line on a terminal, plain lines elsewhere.

A CI log has no cursor to move, and a silent minute there looks like a hang; so without a terminal
a line is printed when a step starts, about every 15 seconds after that, and when it ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

PLAIN_INTERVAL_SECONDS = 15.0


class Step:
    """A running step; `detail` says what it is doing right now."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.text = ""
        self.started = time.monotonic()

    def detail(self, text: str) -> None:
        """Replace the text shown behind the label."""
        self.text = text

    def line(self) -> str:
        """The label with its current detail."""
        return f"{self.label}: {self.text}" if self.text else self.label

    def seconds(self) -> float:
        """Seconds since the step started."""
        return time.monotonic() - self.started


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def say(line: str) -> None:
    """Print a line where the steps are shown."""
    _say(Console(stderr=True), line)


def _refresh(step: Step, stop: threading.Event, bar: Progress) -> None:
    task = bar.add_task(step.line(), total=None)
    while not stop.wait(0.2):
        bar.update(task, description=step.line())


def _report(step: Step, stop: threading.Event, console: Console) -> None:
    while not stop.wait(PLAIN_INTERVAL_SECONDS):
        _say(console, f"  … {step.line()} ({step.seconds():.0f} s)")


@contextmanager
def _displayed(step: Step, console: Console) -> Iterator[None]:
    stop = threading.Event()
    if not console.is_terminal:
        _say(console, f"• {step.label}")
        thread = threading.Thread(target=_report, args=(step, stop, console), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        thread = threading.Thread(target=_refresh, args=(step, stop, bar), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@contextmanager
def step(label: str, console: Console | None = None) -> Iterator[Step]:
    """Show `label` while the block runs, and how long it took afterwards."""
    console = console or Console(stderr=True)
    current = Step(label)
    try:
        with _displayed(current, console):
            yield current
    except BaseException:
        _say(console, f"✗ {label} ({current.seconds():.0f} s)")
        raise
    _say(console, f"✓ {label} ({current.seconds():.0f} s)")
