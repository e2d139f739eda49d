"""The FineTuneJobs of a run: what each asks for, what its user does, and its right end."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from finetune_trainer.contract import Reason, Stage, StageResult
from hack.chaos.api import Api, Raw
from hack.chaos.promises import ENDS, RIGHT_END, Broken
from hack.kwok import stages

MILLISECONDS = {Stage.PREPARE: (400, 2000), Stage.TRAIN: (1500, 7000), Stage.EXPORT: (500, 3000)}
STOP_MILLISECONDS = (1000, 8000)
BACKOFF_LIMIT = 8
TTL_SECONDS = 60  # the shortest that the operator grants


class Course(StrEnum):
    """What happens to a FineTuneJob, beside the faults."""

    PLAIN = "plain"
    FLAKY = "first training fails"
    BAD_DATA = "bad data"
    EXHAUSTED = "fails for good"
    RETRAINED = "edited: trains anew"
    TOUCHED = "edited: reruns nothing"
    DELETED = "deleted"
    RECREATED = "deleted, created again"
    FORGETFUL = "Jobs removed by their TTL"


WEIGHTS = {
    Course.PLAIN: 8,
    Course.FLAKY: 2,
    Course.BAD_DATA: 1,
    Course.EXHAUSTED: 1,
    Course.RETRAINED: 3,
    Course.TOUCHED: 2,
    Course.DELETED: 1,
    Course.RECREATED: 2,
    Course.FORGETFUL: 1,
}


@dataclass
class Subject:
    """One FineTuneJob."""

    name: str
    course: Course
    annotations: dict[Stage, dict[str, str]]
    after: float
    """Seconds from its creation to what its user does."""

    hits: int = 0
    """Faults that cost it an attempt."""

    edition: str = "a"
    generation: int = 1
    uid: str = ""
    """Of the one that was deleted."""

    done: bool = True
    """Whether its user has done all that the course says."""

    steps: list[Callable[[Api], bool]] = field(default_factory=list)

    @property
    def folder(self) -> str:
        """Its output folder."""
        return f"s3://models/{self.name}"

    def body(self) -> Raw:
        """The FineTuneJob in its present edition."""
        pods: Raw = {str(stage): {"annotations": self._notes(stage)} for stage in Stage}
        spec: Raw = {
            "model": {"source": "org/base"},
            "dataset": {"source": "s3://data/faq.csv"},
            "training": {"seed": 1 if self.edition == "a" else 2},
            "output": {"uri": self.folder},
            "backoffLimit": 1 if self.course is Course.EXHAUSTED else BACKOFF_LIMIT,
            "stages": pods,
        }
        if self.course is Course.FORGETFUL:
            spec["ttlSecondsAfterFinished"] = TTL_SECONDS
        return {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": self.name},
            "spec": spec,
        }

    def _notes(self, stage: Stage) -> dict[str, str]:
        said = stages.result(stage, f"{self.name}-{self.edition}", self.folder)
        return {**self.annotations[stage], stages.RESULT: said.to_message().decode()}

    def fault(self, found: Raw | None) -> str:
        """What keeps it from its right end, or nothing."""
        if self.course is Course.DELETED:
            return "" if found is None else "it was deleted, and is there"
        if found is None:
            return "it is gone, though nobody has deleted it"
        status, generation = found.get("status") or {}, found["metadata"]["generation"]
        if status.get("observedGeneration") != generation:
            seen = status.get("observedGeneration")
            return f"status is about generation {seen}, the spec's is {generation}"
        conditions = {each["type"]: each for each in status.get("conditions") or []}
        wanted = {Course.BAD_DATA: Reason.DATASET_EMPTY, Course.EXHAUSTED: Reason.INTERNAL_ERROR}
        if reason := wanted.get(self.course):
            why = conditions.get("Degraded", {}).get("reason")
            right = status.get("phase") == "Failed" and why == reason
            return "" if right else f"{status.get('phase')} ({why}) instead of Failed ({reason})"
        if status.get("phase") != "Succeeded":
            at = [f"{s['name']} {s['state']} {s.get('attempt')}" for s in status.get("stages", [])]
            why = conditions.get("Progressing", {}).get("message", "")
            return f"{status.get('phase')} instead of Succeeded: {', '.join(at)}; {why}"
        return self._unfinished(status, conditions)

    def _unfinished(self, status: Raw, conditions: Raw) -> str:
        """What a FineTuneJob lacks that calls itself Succeeded."""
        ready = conditions.get("Ready", {})
        if ready.get("status") != "True":
            return "Succeeded, but not Ready"
        for each in status["stages"]:
            expected = f"{each['name']}-{self.name}-{self.edition}"
            if (each["state"], each["fingerprint"]) != ("Succeeded", expected):
                return f"{each['name']} is {each['state']} with {each['fingerprint']}"
        return "" if status.get("artifacts") or self.hits else "no artifacts"

    def act(self, api: Api) -> None:
        """Let its user do what is next; raises Away."""
        while self.steps:
            if not self.steps[0](api):
                return
            self.steps.pop(0)
        self.done = True


def subjects(count: int, random_: random.Random, *, brief: bool = False) -> list[Subject]:
    """FineTuneJobs of all courses; in a large number, as often as their weights say.

    `brief` leaves out the course that takes more than a minute.
    """
    courses = [each for each in Course if not (brief and each is Course.FORGETFUL)]
    weights = [WEIGHTS[each] for each in courses]
    order = courses + random_.choices(courses, weights, k=max(0, count - len(courses)))
    chosen = order[:count]
    random_.shuffle(chosen)
    return [_subject(f"job-{n:03}", course, random_) for n, course in enumerate(chosen)]


def _subject(name: str, course: Course, random_: random.Random) -> Subject:
    notes = {
        stage: {
            stages.RUN_FOR: f"{random_.randint(*MILLISECONDS[stage])}ms",
            stages.STOP_FOR: f"{random_.randint(*STOP_MILLISECONDS)}ms",
        }
        for stage in Stage
    }
    if course is Course.FLAKY:
        notes[Stage.TRAIN][f"{stages.EXIT_CODE}-1"] = "1"
    if course is Course.EXHAUSTED:
        notes[Stage.TRAIN][stages.EXIT_CODE] = "1"
    if course is Course.BAD_DATA:
        words = StageResult(stage=Stage.PREPARE, reason=Reason.DATASET_EMPTY, message="No rows.")
        notes[Stage.PREPARE][stages.EXIT_CODE] = "10"
        notes[Stage.PREPARE][stages.FAILURE] = words.to_message().decode()
    if course is Course.FORGETFUL:
        notes[Stage.TRAIN][stages.RUN_FOR] = f"{TTL_SECONDS + 20}s"
    subject = Subject(name, course, notes, after=random_.uniform(0.5, 14))
    subject.steps = _steps(subject)
    subject.done = not subject.steps
    return subject


def _steps(subject: Subject) -> list[Callable[[Api], bool]]:
    """What the user does, each until it returns True."""

    def retrain(api: Api) -> bool:
        subject.edition = "b"
        body = subject.body()
        return api.patch("finetunejobs", subject.name, {"spec": body["spec"]})

    def touch(api: Api) -> bool:
        return api.patch("finetunejobs", subject.name, {"spec": {"ttlSecondsAfterFinished": 7200}})

    def delete(api: Api) -> bool:
        found = api.get("finetunejobs", subject.name)
        if found is not None:
            subject.uid = found["metadata"]["uid"]
            api.delete("finetunejobs", subject.name)
        return api.get("finetunejobs", subject.name) is None

    def create(api: Api) -> bool:
        api.create("finetunejobs", subject.body())
        return True

    steps: dict[Course, list[Callable[[Api], bool]]] = {
        Course.RETRAINED: [retrain],
        Course.TOUCHED: [touch],
        Course.DELETED: [delete],
        Course.RECREATED: [delete, create],
    }
    return steps.get(subject.course, [])


def wrong_ends(all_: list[Subject], api: Api) -> tuple[list[Broken], bool]:
    """Those that are not at their right end, and whether one of them may yet get there.

    Raises Away.
    """
    broken, moving = [], False
    for subject in all_:
        found = api.get("finetunejobs", subject.name)
        words = subject.fault(found)
        if words:
            broken.append(Broken(RIGHT_END, subject.name, f"({subject.course}) {words}"))
            moving = moving or not _is_settled(found)
    return broken, moving


def _is_settled(raw: Raw | None) -> bool:
    status = (raw or {}).get("status") or {}
    current = raw and status.get("observedGeneration") == raw["metadata"]["generation"]
    return bool(current) and status.get("phase") in ENDS
