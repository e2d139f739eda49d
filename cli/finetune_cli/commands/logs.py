"""logs: what a stage's latest pod says."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from typing import Annotated

import typer

from finetune_cli.cluster import Cluster, JsonObject
from finetune_cli.exits import CliError, ExitCode
from finetune_cli.job import STAGES, Job
from finetune_cli.options import Name, on_cluster
from finetune_cli.output import note

SECONDS = 1.0  # between two looks for the next pod
AWAY_SECONDS = 120.0  # for which a log that broke off may stay away


@on_cluster
def logs(
    cluster: Cluster,
    name: Name,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on, from stage to stage, until the end.")
    ] = False,
    stage: Annotated[
        str | None, typer.Option(help="prepare, train or export; default: the latest.")
    ] = None,
    tail: Annotated[int | None, typer.Option(min=0, help="Only so many of the last lines.")] = None,
) -> None:
    """Print the log of a job's latest attempt."""
    if stage is not None and stage not in STAGES:
        raise CliError(ExitCode.USAGE, f"no stage {stage!r}: name {', '.join(STAGES)}.")
    job = Job(cluster.job(name))
    shown: set[str] = set()
    pods = cluster.pods(job.uid, stage)
    if not pods and not follow:
        raise CliError(ExitCode.NOT_FOUND, _no_pod(job, stage))
    while True:
        for pod in pods[-1:] if not shown else [each for each in pods if _name(each) not in shown]:
            if not _started(pod):
                if not follow:
                    raise CliError(ExitCode.NOT_FOUND, _waiting(pod))
                continue
            pieces = _pieces(cluster, _name(pod), follow, None if shown else tail)
            _print(pieces, _name(pod), bool(shown))
            shown.update(map(_name, pods[: pods.index(pod) + 1]))
        if not follow:
            return
        if Job(cluster.job(name)).settled:
            if not shown:
                raise CliError(ExitCode.NOT_FOUND, _no_pod(job, stage))
            return
        time.sleep(SECONDS)
        pods = cluster.pods(job.uid, stage)


def _name(pod: JsonObject) -> str:
    return str(pod["metadata"]["name"])


def _started(pod: JsonObject) -> bool:
    """Whether the trainer's container has run, so that there can be a log."""
    states = (pod.get("status") or {}).get("containerStatuses") or ()
    return any(set(each.get("state") or ()) & {"running", "terminated"} for each in states)


def _pieces(cluster: Cluster, pod: str, follow: bool, tail: int | None) -> Iterator[bytes]:
    """A pod's log; one that is followed is opened anew where the connection breaks."""
    last: float | None = None  # when a piece came
    away: float | None = None
    while True:
        now = time.monotonic()
        since = None if last is None else math.ceil(now - last) + 1  # lines rather twice than never
        lines = tail if last is None else None
        try:
            for piece in cluster.log(pod, follow=follow, tail=lines, since_seconds=since):
                last, away = time.monotonic(), None
                yield piece
        except CliError as error:
            away = now if away is None else away
            gone = error.code is not ExitCode.UNREACHABLE or now - away > AWAY_SECONDS
            if gone or not follow:
                raise
            note(f"note: {error.message} The log is opened anew; some lines may come twice.")
            time.sleep(SECONDS)
        else:
            return


def _print(pieces: Iterator[bytes], pod: str, another: bool) -> None:
    if another:
        note(f"--- {pod}")
    for piece in pieces:
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()


def _no_pod(job: Job, stage: str | None) -> str:
    what = f"pod of {stage}" if stage else "pod"
    return (
        f"{job.name} has no {what}: none was started yet, or it is gone with its log "
        f"(spec.ttlSecondsAfterFinished). `finetune watch {job.name} --once` says how it stands."
    )


def _waiting(pod: JsonObject) -> str:
    status = pod.get("status") or {}
    said = [each.get("message") for each in status.get("conditions") or () if each.get("message")]
    why = f" {said[-1]}" if said else ""
    return f"pod {_name(pod)} has not started yet ({status.get('phase')}).{why} -f waits for it."
