"""The faults, each of which is done once to whatever is there."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence

import httpx

from finetune_operator.api import FINETUNEJOB_NAME_ANNOTATION, MANAGED_BY_LABEL, OPERATOR
from hack.chaos.api import Api, Raw
from hack.chaos.jobs import Subject
from hack.chaos.proxy import ChaosProxy
from hack.chaos.recorder import RESOURCES, Recorder
from hack.kwok import stages
from hack.kwok.cluster import KwokCluster
from hack.operator_process import Operator

HITS = 4  # pods and Jobs that one FineTuneJob may lose, since each time it waits longer
AT_WRITE_SECONDS = 4.0
PAUSE_SECONDS = (2.0, 9.0)  # the Lease lasts LEASE_SECONDS
LEASE_SECONDS = 4
SILENCE_SECONDS = 80.0  # longer than the operator believes a silent watch

Fault = Callable[[], bool]


class Faults:
    """All kinds of faults on one cluster. A fault that finds nothing to hit returns False."""

    def __init__(
        self,
        *,
        cluster: KwokCluster,
        proxy: ChaosProxy,
        operators: Sequence[Operator],
        recorder: Recorder,
        api: Api,
        subjects: list[Subject],
        random_: random.Random,
    ) -> None:
        self._cluster, self._proxy, self._operators = cluster, proxy, operators
        self._recorder, self._api, self._random = recorder, api, random_
        self._subjects = {subject.name: subject for subject in subjects}
        self.target = ""
        """What the last fault has hit, if it was a pod or a Job."""

    def kinds(self, *, brief: bool) -> dict[str, tuple[int, Fault]]:
        """Each fault by its name, with its weight; `brief` leaves out what takes long."""
        long = {} if brief else {"watch silent for 80 s": (1, self.silence_a_watch)}
        return {
            **long,
            "operator killed": (4, self.kill_operator),
            "operator paused and woken": (3, self.pause_operator),
            "operator killed right before a write": (3, lambda: self.kill_at_write("before")),
            "operator killed right after a write": (5, lambda: self.kill_at_write("after")),
            "API server killed": (1, self.restart_apiserver),
            "watches cut": (4, self.cut_watches),
            "events held back": (5, self.hold_events),
            "events repeated": (4, self.repeat_events),
            "status written by somebody else": (4, self.write_status),
            "conflicts at status writes": (4, lambda: self.arm("conflict")),
            "answers of writes lost": (4, lambda: self.arm("lost-answer")),
            "requests refused (503)": (2, lambda: self.arm("refusal")),
            "pod deleted": (5, self.delete_pod),
            "pod evicted": (3, self.evict_pod),
            "Job deleted": (8, self.delete_job),
            "trainer ends with exit code 1": (3, self.fail_pod),
        }

    # The operator and the API server

    def kill_operator(self) -> bool:
        leader = self._leader()
        leader.kill()
        self._start(leader)
        return True

    def pause_operator(self) -> bool:
        """Stop the one that leads in the middle of what it does, mostly beyond its Lease."""
        leader = self._leader()
        leader.pause()
        time.sleep(self._random.uniform(*PAUSE_SECONDS))
        leader.wake()
        return True

    def kill_at_write(self, when: str) -> bool:
        """Kill it in the middle of what belongs together, e.g. a Job and the status about it."""
        hit = threading.Event()
        leader = self._leader()

        def kill() -> None:
            leader.kill()
            hit.set()

        self._proxy.at_write(when, kill)
        met = hit.wait(AT_WRITE_SECONDS)
        self._proxy.at_write("", lambda: None)
        if met:
            self._start(leader)
        return met

    def _leader(self) -> Operator:
        """The one that acts, or any that lives where none does."""
        alive = [each for each in self._operators if each.is_alive()]
        return next(filter(_leads, alive), (alive or list(self._operators))[0])

    def _start(self, operator: Operator) -> None:
        time.sleep(self._random.choice((0, 0.2, 1, 4, 8)))
        operator.start(wait=False)

    def restart_apiserver(self) -> bool:
        self._cluster.restart_apiserver(seconds_away=self._random.uniform(0, 3))
        return True

    # What the operator sees

    def cut_watches(self) -> bool:
        self._proxy.cut()
        return True

    def hold_events(self) -> bool:
        resources = self._random.sample(RESOURCES, self._random.choice((1, 1, 2)))
        for resource in resources:
            self._proxy.hold(resource, self._random.uniform(2, 15))
        return True

    def silence_a_watch(self) -> bool:
        self._proxy.hold(self._random.choice(RESOURCES), SILENCE_SECONDS)
        return True

    def repeat_events(self) -> bool:
        self._proxy.repeat()
        return True

    # What the operator writes

    def arm(self, fault: str) -> bool:
        self._proxy.arm(fault, self._random.randint(1, 5))
        return True

    def write_status(self) -> bool:
        """What a trainer does that shows how far it is, and a GitOps tool that sets labels."""
        jobs = [raw for raw in self._recorder.present("finetunejobs") if not _settled(raw)]
        if not jobs:
            return False
        names = [raw["metadata"]["name"] for raw in jobs]
        chosen = self._random.sample(names, min(len(names), 5))
        for step in range(4):
            for name in chosen:
                told = {"stage": "train", "step": step, "totalSteps": 45}
                self._api.patch("finetunejobs", name, {"status": {"progress": told}}, "/status")
                label = {"metadata": {"labels": {"chaos.finetune.dev/step": str(step)}}}
                self._api.patch("finetunejobs", name, label)
        return True

    # Pods and Jobs

    def delete_pod(self) -> bool:
        pod = self._choose_pod("Pending", "Running")
        return pod is not None and self._api.delete("pods", pod)

    def evict_pod(self) -> bool:
        pod = self._choose_pod("Running")
        return pod is not None and self._api.evict(pod)

    def fail_pod(self) -> bool:
        pod = self._choose_pod("Running")
        note = {"metadata": {"annotations": {stages.EXIT_NOW: "1"}}}
        return pod is not None and self._api.patch("pods", pod, note)

    def delete_job(self) -> bool:
        """Delete a Job as kubectl does: the Job is gone at once, its pod has time to stop."""
        found = [raw for raw in self._recorder.present("jobs") if not _ended(raw)]
        job = self._choose(found)
        return job is not None and self._api.delete("jobs", job, propagationPolicy="Background")

    def _choose_pod(self, *phases: str) -> str | None:
        pods = self._recorder.present("pods")
        return self._choose([raw for raw in pods if raw["status"].get("phase") in phases])

    def _choose(self, children: list[Raw]) -> str | None:
        """One of the objects whose FineTuneJob may be hit again."""
        possible = [raw for raw in children if self._may_be_hit(raw)]
        if not possible:
            return None
        raw = self._random.choice(possible)
        self._subject(raw).hits += 1
        self.target = str(raw["metadata"]["name"])
        return self.target

    def _may_be_hit(self, raw: Raw) -> bool:
        meta = raw["metadata"]
        ours = (meta.get("labels") or {}).get(MANAGED_BY_LABEL) == OPERATOR
        return ours and "deletionTimestamp" not in meta and self._subject(raw).hits < HITS

    def _subject(self, raw: Raw) -> Subject:
        return self._subjects[raw["metadata"]["annotations"][FINETUNEJOB_NAME_ANNOTATION]]


def _leads(operator: Operator) -> bool:
    try:
        return operator.leads()
    except httpx.HTTPError:  # it begins, or ends
        return False


def _settled(raw: Raw) -> bool:
    return raw["status"].get("phase") in ("Succeeded", "Failed")


def _ended(raw: Raw) -> bool:
    conditions = raw["status"].get("conditions") or []
    return any(each["type"] in ("Complete", "Failed") for each in conditions)
