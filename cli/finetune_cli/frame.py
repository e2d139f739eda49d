"""What `watch` shows of a FineTuneJob: stages, bar, loss curve, versions, what happened."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.text import Text

from finetune_cli.curve import Point, draw
from finetune_cli.job import STAGES, Job, JsonObject
from finetune_cli.output import age, bytes_in_words

CURVE_LINES = 7
EVENTS = 6
FILES = 12
VERSIONS = 5
MARKS = {"Succeeded": ("✓", "green"), "Failed": ("✗", "red"), "Running": ("▶", "cyan")}
PLAIN_MARKS = {"Succeeded": "+", "Failed": "x", "Running": ">"}
COLOURS = {"Succeeded": "green", "Failed": "red", "Suspended": "yellow", "Waiting": "yellow"}

# A logging step in the trainer's log, for people or as JSON (finetune_trainer.runtime.reporter).
_STEP = re.compile(r"step (\d+)/\d+ .*?\bloss (\S+)")


def losses_in(log: str) -> list[Point]:
    """The losses that a training's log tells of, by step."""
    found = []
    for line in log.splitlines():
        if match := _STEP.search(line):
            try:
                found.append((float(match[1]), float(match[2])))
            except ValueError:
                continue
    return found


def plain_terminal() -> bool:
    """Whether the terminal can show ASCII alone."""
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower().replace("-", "")
    return not encoding.startswith("utf")


def frame(
    job: Job,
    losses: Sequence[Point],
    events: Sequence[JsonObject],
    width: int,
    now: datetime | None = None,
) -> RenderableType:
    """Everything about a job, for a terminal of so many columns."""
    plain = plain_terminal()
    parts: list[RenderableType] = [_head(job), *_stage_lines(job, width, plain)]
    if told := _figures(job):
        parts.append(Text(told))
    if curve := draw(losses, min(width, 100), CURVE_LINES, ascii_only=plain):
        parts += [Text(""), Text("loss"), Text(curve, no_wrap=True)]
    if job.settled:
        parts += _results(job)
    parts += _notices(job)
    if events:
        parts += [Text(""), Text("events", style="bold")]
        parts += [_event(each, now) for each in events[-EVENTS:]]
    return Group(*parts)


def _head(job: Job) -> Text:
    reason = f" ({job.status['reason']})" if job.status.get("reason") else ""
    text = Text(f"{job.namespace}/{job.name}  ", style="bold")
    text.append(f"{job.phase}{reason}", style=COLOURS.get(job.phase, "cyan"))
    if job.message:
        text.append(f"\n{job.message}", style="none")
    return text


def _stage_lines(job: Job, width: int, plain: bool) -> list[Text]:
    return [_stage_line(job, name, job.stages.get(name, {}), width, plain) for name in STAGES]


def _stage_line(job: Job, name: str, stage: JsonObject, width: int, plain: bool) -> Text:
    state = str(stage.get("state") or "Pending")
    mark, colour = MARKS.get(state, ("·", "dim"))
    text = Text(PLAIN_MARKS.get(state, ".") if plain else mark, style=colour)
    text.append(f" {name:<8}", style="none")
    if state == "Running":
        text.append(_bar(job.progress if job.progress.get("stage") == name else {}, width, plain))
    elif state == "Failed":
        text.append(f"{stage.get('reason') or ''} after attempt {stage.get('attempt')}")
    else:
        text.append("cached: " if stage.get("cached") else "", style="none")
        text.append(str(stage.get("why") or ""), style="none")
    return text


def _bar(progress: JsonObject, width: int, plain: bool) -> str:
    """A bar with the share that is done, steps and time left."""
    percent = str(progress.get("percent") or "")
    share = int(percent[:-1]) if re.fullmatch(r"\d{1,3}%", percent) else 0
    length = max(6, min(30, width - 44))
    done = min(length, length * share // 100)
    full, empty = ("#", "-") if plain else ("█", "░")
    words = [full * done + empty * (length - done), percent or "0%"]
    if progress.get("step") is not None and progress.get("totalSteps"):
        words.append(f"step {progress['step']}/{progress['totalSteps']}")
    if progress.get("eta"):
        words.append(f"{progress['eta']} left")
    return " ".join(words)


def _figures(job: Job) -> str:
    """The figures of the last logging step."""
    progress = job.progress
    known = [
        ("loss", progress.get("loss")),
        ("held-out loss", progress.get("evalLoss")),
        ("epoch", progress.get("epoch")),
        ("tokens/s", progress.get("tokensPerSecond")),
    ]
    words = [f"{name} {value:.4g}" for name, value in known if value is not None]
    if progress.get("message") and not job.settled:
        words.insert(0, str(progress["message"]))
    return "   ".join(words)


def _results(job: Job) -> list[RenderableType]:
    """Files and versions, once there is nothing more to wait for."""
    parts: list[RenderableType] = []
    files = job.artifacts
    if files:
        version = f" of version {job.status['version']}" if job.status.get("version") else ""
        parts += [Text(""), Text(f"files{version}", style="bold")]
        parts += [Text(_file_line(each)) for each in files[:FILES]]
        if len(files) > FILES:
            more = f"… and {len(files) - FILES} more: finetune artifacts {job.name}"
            parts.append(Text(more))
    if len(job.versions) > 1:
        parts += [Text(""), Text("versions", style="bold")]
        parts += [_version_line(each) for each in job.versions[:VERSIONS]]
    return parts


def _file_line(file: JsonObject) -> str:
    quality = file.get("quality") or {}
    verdict = {True: "  passed", False: "  not good enough", None: ""}[quality.get("passed")]
    return f"  {bytes_in_words(int(file['bytes'])):>9}  {file['uri']}{verdict}"


def _version_line(version: JsonObject) -> Text:
    loss = version.get("evalLoss")
    told = "" if loss is None else f"  held-out loss {loss:.4g}"
    made = age(version.get("completionTime"))
    return Text(f"  {version['version']}  {version.get('state')}  {made}{told}")


def _notices(job: Job) -> list[RenderableType]:
    """What the training noticed about itself: of the running one, or of the last."""
    found = job.status.get("notices") or job.progress.get("notices") or ()
    if not found:
        return []
    lines = [f"  {each.get('code')}: {each.get('evidence')} {each.get('remedy')}" for each in found]
    return [Text(""), Text("notices", style="bold"), *map(Text, lines)]


def _event(event: JsonObject, now: datetime | None) -> Text:
    when = age(event.get("lastTimestamp") or event.get("eventTime"), now)
    style = "yellow" if event.get("type") == "Warning" else "none"
    return Text(f"  {when:>4}  {event.get('reason')}: {event.get('message')}", style=style)
