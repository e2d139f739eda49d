"""One run of chaos: FineTuneJobs and faults side by side, then rest, then the check."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from hack import REPOSITORY
from hack.chaos.api import Api, Away, Raw
from hack.chaos.faults import LEASE_SECONDS, Faults
from hack.chaos.jobs import Subject, subjects, wrong_ends
from hack.chaos.promises import Broken, Findings, check, left_behind, orphans
from hack.chaos.proxy import ChaosProxy
from hack.chaos.recorder import Change, Recorder
from hack.kwok.cluster import KwokCluster
from hack.operator_process import Operator
from hack.process import ClusterError, wait_until

TICK_SECONDS = 0.1
START_SECONDS = 120  # of the first operator, on a machine that is busy with other tests
LATEST = 0.95  # the last FineTuneJob is created when this share of the faults is done
FAULT_PAUSE_SECONDS = 0.9  # between two faults, on average
REST_SECONDS = 420.0  # after the last fault; a job that was hit often waits minutes before it tries
LOOK_SECONDS = 2.0
PATIENCE = 0.5  # how often the operator is given the time to go to work before the next fault
READY_SECONDS = 20.0
WORK_SECONDS = 3.0
COLLECTED_SECONDS = 60.0  # the garbage collector has this time for what is left
CALM_SECONDS = 5.0  # so long nothing may be left to do before the promises are checked
LONG = 100  # from so many faults or FineTuneJobs on, there are some that take more than a minute

Say = Callable[[str], None]


@dataclass
class Outcome:
    """What a run has seen."""

    version: str
    seed: int
    subjects: list[Subject]
    findings: Findings
    faults: Counter[str]
    missed: Counter[str]
    """Faults that found nothing to hit."""

    ended_by_itself: int
    gaps: int
    seconds: float
    rest_seconds: float
    met: Counter[str] = field(default_factory=Counter)
    """Requests and events that met a fault of the proxy."""


class Run:
    """The state of a run between its parts."""

    def __init__(
        self,
        cluster: KwokCluster,
        folder: Path,
        *,
        jobs: int,
        faults: int,
        seed: int,
        checkout: Path = REPOSITORY,
        say: Say = lambda _: None,
    ) -> None:
        self.cluster = cluster
        self.random = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
        self.seed = seed
        self.namespace = f"chaos-{uuid4().hex[:8]}"
        self.subjects = subjects(jobs, self.random, brief=jobs < LONG)
        self.wanted = faults
        self.say = say
        self.done: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self.ended_by_itself = 0
        self.log: list[tuple[datetime, str]] = []
        self.history = folder / "history.jsonl"
        self.operators = [_operator(cluster, folder / name, checkout) for name in _names(checkout)]
        self._waiting: list[tuple[float, Subject]] = []
        self._due: list[tuple[float, Subject, bool]] = []

    def __call__(self) -> Outcome:
        """Let it all happen, and check the promises."""
        began = time.monotonic()
        plane = self.cluster.plane
        plane.kubectl("create", "namespace", self.namespace)
        with ExitStack() as stack:
            proxy = stack.enter_context(ChaosProxy(plane))
            recorder = stack.enter_context(Recorder(plane, self.namespace))
            api = Api(plane, self.namespace)
            stack.callback(api.http.close)
            for operator in self.operators:
                operator.reach_through(proxy.port, "http")
                stack.callback(operator.kill)
                operator.start(wait=False)
                wait_until(operator.ready, what="the operator", seconds=START_SECONDS)
            self._be_unkind(proxy, recorder, api)
            proxy.be_kind()
            calm = time.monotonic()
            self.say(f"{sum(self.done.values())} faults are done; waiting until all is at rest")
            wrong = self._rest(api, recorder)
            now = time.monotonic()
            findings = check(recorder.changes(), wrong, len(self.subjects))
            if findings.broken:
                self._write_history(recorder.changes())
            return Outcome(
                version=plane.version,
                seed=self.seed,
                subjects=self.subjects,
                findings=findings,
                faults=self.done,
                missed=self.missed,
                ended_by_itself=self.ended_by_itself,
                gaps=recorder.gaps,
                seconds=now - began,
                rest_seconds=now - calm,
                met=proxy.done,
            )

    def _be_unkind(self, proxy: ChaosProxy, recorder: Recorder, api: Api) -> None:
        faults = Faults(
            cluster=self.cluster,
            proxy=proxy,
            operators=self.operators,
            recorder=recorder,
            api=api,
            subjects=self.subjects,
            random_=self.random,
        )
        kinds = faults.kinds(brief=self.wanted < LONG)
        order = self._order({name: weight for name, (weight, _) in kinds.items()})
        self._schedule()
        told = 0
        while (count := sum(self.done.values())) < self.wanted:
            if count >= told + 25:
                told = count
                self.say(f"{count} of {self.wanted} faults")
            self._wait(self.random.expovariate(1 / FAULT_PAUSE_SECONDS), api)
            name = next(order)
            if self.random.random() < PATIENCE:
                self._wait_for_operator(api)
            faults.target, when = "", datetime.now(UTC)
            try:
                hit = kinds[name][1]()
            except Away:
                hit = False
            (self.done if hit else self.missed)[name] += 1
            if hit:
                self.log.append((when, f"{name} {faults.target}".rstrip()))

    def _order(self, weights: Mapping[str, int]) -> Iterator[str]:
        """Kinds of faults without an end: each of them early on, and as often as it weighs."""
        names = list(weights)
        first = names + self.random.choices(names, list(weights.values()), k=len(names))
        self.random.shuffle(first)
        yield from first[: self.wanted]
        while True:
            yield self.random.choices(names, list(weights.values()))[0]

    def _schedule(self) -> None:
        """Spread the FineTuneJobs over the faults, however long they take; a few come at once."""
        early = len(self.subjects) // 5
        for number, subject in enumerate(self.subjects):
            faults = 0.0 if number < early else self.random.uniform(0, LATEST * self.wanted)
            self._waiting.append((faults, subject))
        self._waiting.sort(key=lambda each: each[0])

    def _wait(self, seconds: float, api: Api) -> None:
        """Let the users act, and the operator live, for a time."""
        until = time.monotonic() + seconds
        while True:
            self._act(api)
            self._revive()
            left = until - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, TICK_SECONDS))

    def _wait_for_operator(self, api: Api) -> None:
        """Let an operator that begins anew go to work, as it mostly can before the next fault."""
        until = time.monotonic() + READY_SECONDS
        while time.monotonic() < until and not self._operator_is_ready():
            self._wait(TICK_SECONDS, api)
        self._wait(self.random.uniform(0, WORK_SECONDS), api)

    def _operator_is_ready(self) -> bool:
        try:
            return all(each.ready() for each in self.operators)
        except ClusterError:  # one was killed right now
            return False

    def _act(self, api: Api) -> None:
        now = time.monotonic()
        while self._waiting and self._waiting[0][0] <= self.done.total():
            self._put(now, self._waiting.pop(0)[1], True)
        while self._due and self._due[0][0] <= now:
            _, subject, new = self._due.pop(0)
            again = now + 0.5
            try:
                if new:
                    api.create("finetunejobs", subject.body())
                    again = now + subject.after
                else:
                    subject.act(api)
            except Away:
                self._put(again, subject, new)
                continue
            if not subject.done:
                self._put(again, subject, False)

    def _put(self, when: float, subject: Subject, new: bool) -> None:
        self._due.append((when, subject, new))
        self._due.sort(key=lambda due: due[0])

    def _revive(self) -> None:
        """What a kubelet does when an operator ends by itself."""
        for operator in self.operators:
            if not operator.is_alive():
                self.ended_by_itself += operator.has_ended()
                operator.start(wait=False)

    def _rest(self, api: Api, recorder: Recorder) -> list[Broken]:
        """Wait until all is at its right end; what is not when the time is over."""
        now = time.monotonic()
        until, deadline = now + CALM_SECONDS, now + REST_SECONDS
        collected = now
        while True:
            self._wait(LOOK_SECONDS, api)
            wrong, moving = wrong_ends(self.subjects, recorder.present("finetunejobs"))
            now = time.monotonic()
            present = recorder.all_present()
            if moving or self._due or orphans(present):
                until, collected = now + CALM_SECONDS, now + COLLECTED_SECONDS
            elif now < collected and left_behind(present):
                until = now + CALM_SECONDS
            if now > min(until, deadline):
                return wrong

    def _write_history(self, changes: list[Change]) -> None:
        """Write down, by time, all that was done and seen, for whoever looks for the cause."""
        rows = [(when, {"fault": words}) for when, words in self.log]
        rows += [(each.seen, _row(each)) for each in changes]
        with self.history.open("w") as sink:
            for when, row in sorted(rows, key=lambda row: row[0]):
                sink.write(json.dumps({"time": when.isoformat(), **row}) + "\n")


def _names(checkout: Path) -> tuple[str, ...]:
    """Two operators, unless that version knows no Lease: then both would act."""
    elects = (checkout / "operator/finetune_operator/leadership.py").exists()
    return ("first", "second") if elects else ("only",)


def _operator(cluster: KwokCluster, folder: Path, checkout: Path) -> Operator:
    folder.mkdir(parents=True, exist_ok=True)
    return Operator(
        cluster.plane,
        folder,
        checkout,
        FINETUNE_RESYNC_SECONDS="30",
        FINETUNE_LOG_FORMAT="",
        FINETUNE_LEASE_SECONDS=str(LEASE_SECONDS),
    )


def _row(change: Change) -> Raw:
    about = {"resource": change.resource, "name": change.name, "version": change.version}
    return {**about, "deleted": change.deleted, "missed": change.missed, **change.raw}
