"""watch: a FineTuneJob until its end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from finetune_cli.cluster import Cluster, JsonObject
from finetune_cli.curve import Point
from finetune_cli.exits import CliError, ExitCode
from finetune_cli.frame import frame, losses_in
from finetune_cli.job import Job
from finetune_cli.options import Name, Output, on_cluster
from finetune_cli.output import Form, console, note, show_object

SECONDS = 2.0  # between two looks
UNSEEN_SECONDS = 30.0  # after which it is worth saying that no operator has taken the job up
AWAY_SECONDS = 120.0  # for which an API server that was there may be away


@dataclass
class View:
    """What is known of a job, and how it came to be."""

    job: Job
    losses: list[Point] = field(default_factory=list)
    events: list[JsonObject] = field(default_factory=list)

    def take(self, job: Job) -> None:
        """Look at the job again; the loss of another training begins a new curve."""
        another = job.progress.get("job") != self.job.progress.get("job")
        if another and job.progress.get("stage") == "train":
            self.losses = []
        self.job = job
        progress = job.progress
        if progress.get("loss") is not None and progress.get("step") is not None:
            self.losses.append((float(progress["step"]), float(progress["loss"])))


@on_cluster
def watch(
    cluster: Cluster,
    name: Name,
    once: Annotated[bool, typer.Option("--once", help="Show it once, and end with 0.")] = False,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds, then end with 6; default: none.")
    ] = None,
    output: Output = Form.TABLE,
) -> None:
    """Show a job until its end: bar, loss curve, time left, events.

    Ends with 0 when it has succeeded, 1 when it has failed, 7 when it is suspended.
    """
    if once:
        _show_once(cluster, name, output)
    else:
        raise typer.Exit(follow(cluster, name, timeout, output))


def follow(
    cluster: Cluster, name: str, timeout: float | None = None, output: Form = Form.TABLE
) -> ExitCode:
    """Show a job until nothing more happens by itself; how it ended."""
    began = time.monotonic()
    view = _view(cluster, name)
    states = _states(cluster, view, began, timeout)
    if output is Form.TABLE and sys.stdout.isatty():
        _live(states)
    else:
        _lines(view, states, output)
    job = view.job
    if not job.settled:
        seconds = time.monotonic() - began
        note(f"error: {name} is still {job.phase} after {seconds:.0f} s (--timeout).")
        return ExitCode.TIMED_OUT
    if job.exit_code is ExitCode.SUSPENDED:
        note(f"{name} is suspended: `finetune resume {name}` lets it go on.")
    if job.exit_code is ExitCode.FAILED:
        note(f"error: {job.message or 'it failed'} `finetune logs {name}` shows the log.")
    return job.exit_code


def _show_once(cluster: Cluster, name: str, output: Form) -> None:
    view = _view(cluster, name)
    if output in (Form.JSON, Form.YAML):
        show_object(view.job.tidy, output)
    elif output is Form.NAME:
        typer.echo(f"finetunejob.finetune.dev/{name}")
    else:
        out = console()
        out.print(frame(view.job, view.losses, view.events, min(out.width, 100)))


def _view(cluster: Cluster, name: str) -> View:
    """What there is to know at the start; the log of a running training has its earlier losses."""
    job = Job(cluster.job(name))
    view = View(job)
    with suppress(CliError):  # rights on pods and events are other rights
        view.events = cluster.events(job.uid)
        pods = cluster.pods(job.uid, "train")
        if pods:
            log = b"".join(cluster.log(pods[-1]["metadata"]["name"]))
            view.losses = losses_in(log.decode(errors="replace"))
    view.take(job)
    return view


def _states(cluster: Cluster, view: View, began: float, timeout: float | None) -> Iterator[View]:
    """The view after each look, until the job is settled or the time is over."""
    warned, away_since = False, None
    while True:
        yield view
        passed = time.monotonic() - began
        if view.job.settled or (timeout is not None and passed >= timeout):
            return
        if not warned and not view.job.seen and passed > UNSEEN_SECONDS:
            note("No operator has taken this job up yet: `finetune doctor` says whether one runs.")
            warned = True
        left = SECONDS if timeout is None else min(SECONDS, max(0.0, timeout - passed))
        time.sleep(left)
        try:
            view.take(Job(cluster.job(view.job.name)))
            away_since = None
        except CliError as error:
            away_since = away_since or time.monotonic()
            if error.code is not ExitCode.UNREACHABLE or (
                time.monotonic() - away_since > AWAY_SECONDS
            ):
                raise
        with suppress(CliError):
            view.events = cluster.events(view.job.uid)


def _live(states: Iterator[View]) -> None:
    """One picture that changes in its place."""
    from rich.live import Live

    out = console()
    with Live(console=out, auto_refresh=False, vertical_overflow="crop") as live:
        for each in states:
            live.update(frame(each.job, each.losses, each.events, out.width), refresh=True)


def _lines(view: View, states: Iterator[View], output: Form) -> None:
    """A line for each change, for pipes and logs; at the end the whole picture."""
    said, told = "", {each["metadata"]["uid"] for each in view.events}
    for each in states:
        words = json.dumps(_facts(each.job)) if output is Form.JSON else _words(each.job)
        if words != said:
            typer.echo(words)
            said = words
        for event in each.events:
            if event["metadata"]["uid"] not in told and output is not Form.JSON:
                typer.echo(f"  {event.get('reason')}: {event.get('message')}")
            told.add(event["metadata"]["uid"])
    if output is Form.TABLE:
        out = console()
        out.print(frame(view.job, view.losses, [], min(out.width, 100)))


def _facts(job: Job) -> dict[str, Any]:
    """What changes, for programs."""
    facts = {
        "name": job.name,
        "namespace": job.namespace,
        "phase": job.phase,
        "reason": job.status.get("reason"),
        "stage": job.status.get("stage"),
        "version": job.status.get("version"),
        "message": job.message,
    }
    wanted = ("percent", "step", "totalSteps", "epoch", "loss", "evalLoss", "eta")
    return facts | {key: job.progress.get(key) for key in wanted}


def _words(job: Job) -> str:
    """The same in one line."""
    facts = _facts(job)
    words = [f"{job.phase:<10}", *(str(facts[each]) for each in ("reason",) if facts[each])]
    if job.settled:
        return " ".join([*words, job.message])
    if facts["stage"]:
        words.append(str(facts["stage"]))
    if facts["percent"]:
        words.append(str(facts["percent"]))
    if facts["loss"] is not None:
        words.append(f"loss {facts['loss']:.4g}")
    if facts["eta"]:
        words.append(f"{facts['eta']} left")
    return " ".join(words)
