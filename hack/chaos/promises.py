"""What the operator promises, checked on what was seen. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from finetune_operator.api import (
    ATTEMPT_LABEL,
    FINETUNEJOB_NAME_ANNOTATION,
    FINETUNEJOB_UID_LABEL,
    STAGE_KEY_ANNOTATION,
    STAGE_LABEL,
    TRAINER_CONTAINER,
)
from finetune_operator.observe import controller_uid
from hack.chaos.api import Raw
from hack.chaos.recorder import Change

RIGHT_END = "every job at its right end"
AT_ONCE = "no stage twice at once"
COMPLETED_TWICE = "none completed twice"
BACKWARDS = "no status backwards"
ORPHAN = "no orphan"
PROMISES = (RIGHT_END, AT_ONCE, COMPLETED_TWICE, BACKWARDS, ORPHAN)

# A phase that isn't here (a pod waits, a job is suspended) may come at any time.
PHASES = {"Pending": 0, "Preparing": 0, "Training": 1, "Exporting": 2, "Succeeded": 3, "Failed": 3}
ENDS = ("Succeeded", "Failed")


@dataclass(frozen=True)
class Broken:
    """A promise that was not kept."""

    promise: str
    job: str
    words: str
    """Which stage, which objects, and when."""


@dataclass
class Findings:
    """What the check of all promises has found."""

    broken: list[Broken] = field(default_factory=list)
    checked: dict[str, str] = field(default_factory=dict)
    """For each promise, on how much it was checked."""

    excused: list[str] = field(default_factory=list)
    """What looks like a broken promise and is no fault of the operator's, with its cause."""


@dataclass
class PodLife:
    """A pod from its first to its last sign of life."""

    name: str
    job: str
    """Name of the FineTuneJob."""

    uid: str
    """The FineTuneJob's uid."""

    stage: str
    attempt: str
    controller: str
    """Uid of its Job."""

    created: int
    runs: Change | None = None
    """When its trainer was first seen at work."""

    ended: Change | None = None
    """When its trainer was first seen ended, or the pod gone."""

    exit_code: int | None = None
    gone: int | None = None

    def words(self) -> str:
        began = _clock(self.runs.seen) if self.runs else "?"
        return f"pod {self.name} (attempt {self.attempt}, {began} to {self.until()})"

    def until(self) -> str:
        return _clock(self.ended.seen) if self.ended else "now"


def check(changes: Sequence[Change], wrong_ends: Iterable[Broken], jobs: int) -> Findings:
    """Check all promises on all changes in the API server's order, when all has come to rest."""
    found = Findings(broken=list(wrong_ends))
    pods = pod_lives(changes)
    statuses = [each for each in changes if each.resource == "finetunejobs" and not each.deleted]
    completed = [pod for pod in pods if pod.exit_code == 0]
    found.broken += at_once(pods)
    _completed_twice(changes, completed, found)
    found.broken += backwards(statuses)
    found.broken += orphans(changes)
    found.excused += [
        f"missed by the garbage collector: {each.job}: {each.words}"
        for each in left_behind(changes)
    ]
    children = {each.uid for each in changes if each.resource != "finetunejobs"}
    found.checked = {
        RIGHT_END: f"{jobs} jobs",
        AT_ONCE: f"{len(pods)} pods",
        COMPLETED_TWICE: f"{len(completed)} completions",
        BACKWARDS: f"{len(statuses)} states",
        ORPHAN: f"{len(children)} Jobs and pods",
    }
    return found


def pod_lives(changes: Iterable[Change]) -> list[PodLife]:
    """The trainers' pods, in the order of their creation."""
    lives: dict[str, PodLife] = {}
    for change in changes:
        labels = change.raw["metadata"].get("labels") or {}
        if change.resource != "pods" or STAGE_LABEL not in labels:
            continue
        life = lives.setdefault(change.uid, _pod_life(change, labels))
        state = _trainer(change.raw)
        if life.runs is None and ("running" in state or "terminated" in state):
            life.runs = change
        ended = state.get("terminated")
        if ended is not None and life.exit_code is None:
            life.exit_code = ended["exitCode"]
        over = ended is not None or change.raw["status"].get("phase") in ENDS or change.deleted
        if over and life.ended is None:
            life.ended = change
        if change.deleted:
            life.gone = change.version
    return list(lives.values())


def _pod_life(change: Change, labels: dict[str, str]) -> PodLife:
    notes = change.raw["metadata"].get("annotations") or {}
    return PodLife(
        name=change.name,
        job=notes.get(FINETUNEJOB_NAME_ANNOTATION, "?"),
        uid=labels.get(FINETUNEJOB_UID_LABEL, "?"),
        stage=labels[STAGE_LABEL],
        attempt=labels.get(ATTEMPT_LABEL, "?"),
        controller=controller_uid(change.raw, "Job"),
        created=change.version,
    )


def at_once(pods: Iterable[PodLife]) -> list[Broken]:
    """Two trainers of one stage at work, which would write the same files."""
    found = []
    at_work: dict[tuple[str, str], list[PodLife]] = defaultdict(list)
    began = [(pod.runs.version, pod) for pod in pods if pod.runs]
    for _, pod in sorted(began, key=lambda pair: pair[0]):
        others = at_work[pod.job, pod.stage]
        for other in others:
            if _overlap(other, pod):
                words = f"{pod.stage}: {other.words()} beside {pod.words()}"
                found.append(Broken(AT_ONCE, pod.job, words))
        others.append(pod)
    return found


def _overlap(one: PodLife, other: PodLife) -> bool:
    """Whether the other began before the one had ended."""
    if other.runs is None:
        return False
    if one.ended is None:
        return True
    if one.ended.missed or other.runs.missed:
        # In a gap of the watch the order is unknown; what nodes say is exact to the second.
        return _finished(one.ended) > _started(other.runs)
    return one.ended.version > other.runs.version


def _completed_twice(
    changes: Sequence[Change], completed: Sequence[PodLife], found: Findings
) -> None:
    """A stage that was done, for the same inputs, once more.

    Two causes are not the operator's: a result was deleted before the operator had written it down,
    or the Job controller, whose cache may be old after an outage of the API server, has made two
    pods of one Job. (A trainer would find its work in the bucket, and end.)
    """
    keys = {
        each.uid: (each.raw["metadata"].get("annotations") or {}).get(STAGE_KEY_ANNOTATION)
        for each in changes
        if each.resource == "jobs"
    }
    jobs_gone = {c.uid: c.version for c in changes if c.resource == "jobs" and _leaves(c)}
    known = _first_known(changes)
    first: dict[tuple[str, str, str | None], PodLife] = {}
    for pod in completed:
        key = (pod.uid, pod.stage, keys.get(pod.controller))
        before = first.setdefault(key, pod)
        if before is pod:
            continue
        words = f"{pod.stage}: {before.words()} and {pod.words()}"
        lost = min(before.gone or 1 << 62, jobs_gone.get(before.controller, 1 << 62), pod.created)
        if lost < min(known.get(key, 1 << 62), pod.created):
            found.excused.append(f"ran again, since its result was deleted: {pod.job}: {words}")
        elif pod.controller == before.controller:
            found.excused.append(
                f"ran again, since the Job controller made two pods: {pod.job}: {words}"
            )
        else:
            found.broken.append(Broken(COMPLETED_TWICE, pod.job, words))


def _leaves(change: Change) -> bool:
    return change.deleted or "deletionTimestamp" in change.raw["metadata"]


def _first_known(changes: Iterable[Change]) -> dict[tuple[str, str, str | None], int]:
    """When status first said that a stage is done, by FineTuneJob, stage and key."""
    known: dict[tuple[str, str, str | None], int] = {}
    for change in changes:
        if change.resource != "finetunejobs":
            continue
        for stage in change.raw["status"].get("stages") or []:
            if stage.get("state") == "Succeeded":
                key = stage.get("fingerprint")
                if stage["name"] == "prepare":
                    status = change.raw["status"]
                    planned = status.get("planned") or {}
                    key = str(planned.get("generation") or status.get("observedGeneration"))
                known.setdefault((change.uid, stage["name"], key), change.version)
    return known


def backwards(statuses: Iterable[Change]) -> list[Broken]:
    """A status that says less than one before it about the same generation."""
    found: list[Broken] = []
    last: dict[str, Change] = {}
    for change in statuses:
        before = last.get(change.uid)
        last[change.uid] = change
        if before is None:
            continue
        for words in _steps_back(before.raw["status"], change.raw["status"]):
            when = f"{_clock(change.seen)}, resourceVersion {change.version}"
            found.append(Broken(BACKWARDS, change.name, f"{words} ({when})"))
    return found


def _steps_back(before: Raw, after: Raw) -> Iterator[str]:
    one, other = before.get("observedGeneration") or 0, after.get("observedGeneration") or 0
    if other < one:
        yield f"observedGeneration from {one} to {other}"
    if other != one:
        return
    old, new = str(before.get("phase")), str(after.get("phase"))
    if (old in ENDS and new != old) or PHASES.get(new, 9) < PHASES.get(old, 0):
        yield f"phase from {old} to {new}"
    if _ready(before) and not _ready(after):
        yield "Ready from True to False"
    stages = {stage["name"]: stage for stage in after.get("stages") or []}
    for stage in before.get("stages") or []:
        now = stages.get(stage["name"], {})
        yield from _stage_steps_back(stage, now)


def _stage_steps_back(before: Raw, after: Raw) -> Iterator[str]:
    name = before["name"]
    if before.get("fingerprint") and after.get("fingerprint") != before["fingerprint"]:
        return  # it is about other inputs
    for counter in ("attempt", "failures", "disruptions"):
        if after.get(counter, 0) < before.get(counter, 0):
            yield f"{name}'s {counter} from {before[counter]} to {after.get(counter, 0)}"
    if before.get("state") in ENDS and after.get("state") != before["state"]:
        yield f"{name} from {before['state']} to {after.get('state')}"


def _ready(status: Raw) -> bool:
    conditions = status.get("conditions") or []
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def orphans(changes: Iterable[Change]) -> list[Broken]:
    """Jobs and pods at work, at the end of all, of a FineTuneJob that is gone or settled."""
    return [found for found, at_work in _without_owner_at_work(changes) if at_work]


def left_behind(changes: Iterable[Change]) -> list[Broken]:
    """Ended Jobs and pods of a FineTuneJob that is gone, which the garbage collector has missed."""
    return [found for found, at_work in _without_owner_at_work(changes) if not at_work]


def _without_owner_at_work(changes: Iterable[Change]) -> Iterator[tuple[Broken, bool]]:
    """What its FineTuneJob has no need of any more, and whether it is at work."""
    last = {(change.resource, change.uid): change for change in changes}
    present = {key: change for key, change in last.items() if not change.deleted}
    jobs = {uid: c for (resource, uid), c in present.items() if resource == "finetunejobs"}
    for (resource, _), change in present.items():
        labels = change.raw["metadata"].get("labels") or {}
        if resource == "finetunejobs" or STAGE_LABEL not in labels:
            continue
        name = (change.raw["metadata"].get("annotations") or {}).get(
            FINETUNEJOB_NAME_ANNOTATION, "?"
        )
        what = f"{resource.removesuffix('s')} {change.name} of {labels[STAGE_LABEL]}"
        owner = jobs.get(labels.get(FINETUNEJOB_UID_LABEL, ""))
        at_work = _at_work(resource, change.raw)
        if owner is None:
            yield Broken(ORPHAN, name, f"{what} is left, and its FineTuneJob is gone"), at_work
        elif owner.raw["status"].get("phase") in ENDS and at_work:
            yield Broken(ORPHAN, name, f"{what} goes on though all is over"), at_work


def _at_work(resource: str, raw: Raw) -> bool:
    status = raw["status"]
    if resource == "pods":
        return status.get("phase") not in ENDS
    ends = {each["type"] for each in status.get("conditions") or [] if each["status"] == "True"}
    return not ends & {"Complete", "Failed"}


def _trainer(raw: Raw) -> Raw:
    for container in raw["status"].get("containerStatuses") or []:
        if container["name"] == TRAINER_CONTAINER:
            return container.get("state") or {}
    return {}


def _started(change: Change) -> datetime:
    state = _trainer(change.raw)
    part = state.get("running") or state.get("terminated") or {}
    return datetime.fromisoformat(part["startedAt"]) if "startedAt" in part else change.seen


def _finished(change: Change) -> datetime:
    ended = _trainer(change.raw).get("terminated") or {}
    return datetime.fromisoformat(ended["finishedAt"]) if "finishedAt" in ended else change.seen


def _clock(when: datetime) -> str:
    return when.strftime("%H:%M:%S.%f")[:-3]
