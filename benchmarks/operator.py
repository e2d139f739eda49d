"""FineTuneJobs by the thousand on a real API server, against the same objects made directly.

    python -m benchmarks.operator [--jobs 100 1000 5000] [--lives 1000] [--rate 10] [--output FILE]

Directly: a loop over the operator's own client makes ServiceAccount, Role, RoleBinding, ConfigMap
and Job of one stage, and writes a status, with as many at a time as the operator has workers. Ours:
the operator, which already watches N FineTuneJobs and isn't the leader, gets the Lease; the time is
until each has its Job, and a status that says so. Nothing runs the pods.

Then FineTuneJobs are created at a steady rate, and the time from each one's creation to its Job is
taken. At last the operator is left alone for a while, and started anew.

`--lives` takes as many FineTuneJobs through whole lives (prepare, train, export, done, tidied up),
beside the real scheduler and Job controller, on nodes that kwok plays (KWOK names it). Each pod
runs for a second. The Job controller makes 20 requests a second by default, and so sets the pace.

CPU-seconds depend less on what else the machine does than times do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import httpx
import psutil

from finetune_operator.api import KIND
from finetune_operator.cluster import METADATA_ONLY, SUPPORTS, Cluster
from finetune_operator.manifests import stage_objects
from finetune_operator.observe import observe_finetunejob
from finetune_operator.settings import Settings
from finetune_trainer.contract import Hardware, Stage
from hack.cluster.control_plane import ControlPlane
from hack.kwok.cluster import KwokCluster
from hack.operator_process import NAMESPACE, RELEASE, Operator, install
from hack.process import wait_until

SPEC = {
    "model": {"source": "org/base"},
    "dataset": {"source": "s3://data/faq.csv"},
    "output": {"uri": "s3://models/{name}"},
}
WORKERS = Settings.model_fields["workers"].default
CREATORS = 16
LONG = 3600  # seconds of a Lease that nobody waits out
STEADY_SECONDS = 20
REST_SECONDS = 30
SETTLED_SECONDS = 10  # for what the last pod has changed
PROGRESS_SECONDS = 10
WRITES = {"POST", "PUT", "PATCH", "DELETE"}
Raw = dict[str, Any]


@dataclass(frozen=True)
class Figures:
    """One size."""

    count: int
    direct: float
    """Seconds."""

    ours: float
    writes: float
    """Of the operator, for each FineTuneJob."""

    memory: int
    """Bytes that the operator's process has resident, with all of them at work."""

    cpu: float
    """Seconds of CPU of the operator."""

    direct_cpu: float
    """The same of this process, which makes the objects directly."""


@dataclass(frozen=True)
class Lives:
    """Whole lives."""

    count: int
    seconds: float
    requests: dict[str, float]
    """Of the operator, for each FineTuneJob, by verb."""

    cpu: float
    memory: int
    left: int
    """ServiceAccounts, Roles, RoleBindings and ConfigMaps that are still there."""


def finetunejob(namespace: str, name: str) -> Raw:
    spec = json.loads(json.dumps(SPEC).replace("{name}", f"{namespace}/{name}"))
    meta = {"namespace": namespace, "name": name}
    return {"apiVersion": "finetune.dev/v1alpha1", "kind": KIND, "metadata": meta, "spec": spec}


async def at_a_time(work: Iterable[Callable[[], Awaitable[object]]], limit: int) -> None:
    """Await all, so many at a time."""
    left = iter(work)

    async def one_after_the_other() -> None:
        for each in left:
            await each()

    await asyncio.gather(*(one_after_the_other() for _ in range(limit)))


async def make_directly(cluster: Cluster, namespace: str, count: int) -> tuple[float, float]:
    """Seconds, and seconds of CPU, to make the objects of one stage for each FineTuneJob, and its
    status."""
    made = await create_all(cluster, namespace, count)
    settings = Settings(trainer_image="trainer:1")

    async def make(raw: Raw) -> None:
        owner = observe_finetunejob(raw)
        if owner.spec is None:
            raise ValueError(owner.spec_error)
        objects = stage_objects(
            owner,
            owner.spec,
            settings,
            stage=Stage.PREPARE,
            stage_key="1",
            attempt=1,
            resolved=None,
            hardware=Hardware(gpus=0),
        )
        for body in objects:
            await cluster.create(body)
        status = {"phase": "Preparing", "observedGeneration": owner.generation}
        await cluster.patch_status(namespace, owner.name, owner.resource_version, status)

    began, used = time.monotonic(), time.process_time()
    await at_a_time((partial(make, raw) for raw in made), WORKERS)
    return time.monotonic() - began, time.process_time() - used


async def create_all(cluster: Cluster, namespace: str, count: int) -> list[Raw]:
    """Create so many FineTuneJobs."""
    made: list[Raw] = []

    async def create(name: str) -> None:
        made.append(await cluster.create(finetunejob(namespace, name)))

    names = (f"job-{number:05}" for number in range(count))
    await at_a_time((partial(create, name) for name in names), CREATORS)
    return made


class Lease:
    """Held here, it keeps the operator from acting."""

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane

    def hold(self) -> None:
        spec = {"holderIdentity": "benchmark", "leaseDurationSeconds": LONG}
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": RELEASE, "namespace": NAMESPACE},
            "spec": spec,
        }
        self._plane.kubectl("apply", "-f", "-", input=json.dumps(body))

    def give_away(self) -> None:
        self._plane.kubectl("delete", "lease", RELEASE, "-n", NAMESPACE)


def requests(operator: Operator) -> dict[str, float]:
    """The operator's requests so far, by verb."""
    found: dict[str, float] = {}
    pattern = r'^finetune_api_requests_total\{code="\w+",verb="(\w+)"\} (\S+)$'
    for verb, value in re.findall(pattern, operator.get("/metrics").text, re.MULTILINE):
        found[verb] = found.get(verb, 0) + float(value)
    return found


def writes(operator: Operator) -> float:
    return sum(value for verb, value in requests(operator).items() if verb in WRITES)


def attempts(operator: Operator) -> float:
    """How many attempts at `prepare` a status says were begun."""
    pattern = r'^finetune_stage_attempts_total\{.*stage="prepare"\} (\S+)$'
    return sum(map(float, re.findall(pattern, operator.get("/metrics").text, re.MULTILINE)))


def jobs(plane: ControlPlane, namespace: str, selector: str = "") -> int:
    """How many Jobs there are."""
    query = {"labelSelector": selector}
    path = f"/apis/batch/v1/namespaces/{namespace}/jobs"
    headers = {"Authorization": f"Bearer {plane.admin_token}", "Accept": METADATA_ONLY}
    trusted = _trusted(str(plane.ca))
    answer = httpx.get(
        plane.server + path,
        params=query,
        headers=headers,
        verify=trusted,
        trust_env=False,
        timeout=120,
    )
    answer.raise_for_status()
    return len(answer.json()["items"] or ())


@cache
def _trusted(ca: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca)


async def compare(plane: ControlPlane, cluster: Cluster, folder: Path, count: int) -> Figures:
    """Both ways for one size."""
    direct, ours = f"direct-{count}", f"ours-{count}"
    for namespace in (direct, ours):
        plane.kubectl("create", "namespace", namespace)
    seconds, direct_cpu = await make_directly(cluster, direct, count)
    await create_all(cluster, ours, count)
    lease = Lease(plane)
    lease.hold()
    operator = started(plane, folder / str(count), ours)
    try:
        before, used = writes(operator), cpu_seconds(operator)
        lease.give_away()
        began = time.monotonic()
        wait_until(
            lambda: attempts(operator) >= count and jobs(plane, ours) >= count,
            what=f"{count} Jobs",
            seconds=3600,
            interval=0.2,
        )
        took = time.monotonic() - began
        made, used = writes(operator) - before, cpu_seconds(operator) - used
        return Figures(count, seconds, took, made / count, resident(operator), used, direct_cpu)
    finally:
        operator.stop()


def started(plane: ControlPlane, folder: Path, namespace: str) -> Operator:
    folder.mkdir(parents=True, exist_ok=True)
    operator = Operator(plane, folder, FINETUNE_NAMESPACES=namespace, FINETUNE_WORKERS=str(WORKERS))
    operator.start()
    return operator


def resident(operator: Operator) -> int:
    return int(psutil.Process(operator.pid).memory_info().rss)


def cpu_seconds(operator: Operator) -> float:
    """What it has used so far."""
    used = psutil.Process(operator.pid).cpu_times()
    return float(used.user + used.system)


async def live(folder: Path, count: int) -> Lives:
    """Whole lives of so many FineTuneJobs."""
    namespace = "lives"
    with KwokCluster(folder) as kwok:
        plane = kwok.plane
        kwok.add_node("fake-1", gpus=8)
        install(plane)
        plane.kubectl("create", "namespace", namespace)
        os.environ["KUBECONFIG"] = str(plane.kubeconfig)
        async with Cluster.connect(60, lambda *_: None) as cluster:
            operator = started(plane, folder, namespace)
            try:
                wait_until(operator.leads, what="the operator to lead", seconds=60)
                before, used = requests(operator), cpu_seconds(operator)
                began = time.monotonic()
                await create_all(cluster, namespace, count)
                await _until_all_are_over(operator, count)
                seconds, after = time.monotonic() - began, requests(operator)
                each = {verb: (after[verb] - before.get(verb, 0)) / count for verb in after}
                used = cpu_seconds(operator) - used
                left = [item for kind in SUPPORTS async for item in cluster.in_brief(kind, ())]
                return Lives(count, seconds, each, used, resident(operator), len(left))
            finally:
                operator.stop()


async def _until_all_are_over(operator: Operator, count: int) -> None:
    """Wait, and say every ten seconds how many have ended; raises RuntimeError if one fails."""
    pattern = r'^finetune_jobs\{.*phase="(\w+)"\} (\S+)$'
    told = time.monotonic()
    while True:
        text = operator.get("/metrics").text
        phases = {name: int(float(n)) for name, n in re.findall(pattern, text, re.MULTILINE)}
        if phases.get("Failed"):
            raise RuntimeError(f"{phases['Failed']} FineTuneJobs failed")
        if phases.get("Succeeded", 0) >= count and "finetune_queue_depth 0.0" in text:
            return
        if time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            words = ", ".join(f"{n} {name}" for name, n in sorted(phases.items()) if n)
            print(f"  … {words}", file=sys.stderr, flush=True)
        await asyncio.sleep(0.5)


async def steadily(
    plane: ControlPlane, cluster: Cluster, folder: Path, rate: float
) -> tuple[float, float]:
    """Median and 99th percentile of the seconds from a FineTuneJob's creation to its Job."""
    namespace = "steady"
    plane.kubectl("create", "namespace", namespace)
    operator = started(plane, folder / namespace, namespace)
    wait_until(operator.leads, what="the operator to lead", seconds=60)
    taken: list[float] = []

    async def one(number: int) -> None:
        await asyncio.sleep(number / rate)
        began = time.monotonic()
        raw = await cluster.create(finetunejob(namespace, f"job-{number:04}"))
        label = f"finetune.dev/job={raw['metadata']['name']}"
        there = partial(jobs, plane, namespace, label)
        await asyncio.to_thread(
            wait_until, lambda: there() > 0, what="a Job", seconds=600, interval=0.02
        )
        taken.append(time.monotonic() - began)

    try:
        await asyncio.gather(*(one(number) for number in range(int(rate * STEADY_SECONDS))))
    finally:
        operator.stop()
    return statistics.median(taken), statistics.quantiles(taken, n=100)[98]


def pods_are_made(plane: ControlPlane, namespace: str) -> bool:
    """Whether the Job controller, which makes some 20 pods a second, is done."""
    found = plane.kubectl("get", "pods", "-n", namespace, "-o", "name").split()
    return len(found) >= jobs(plane, namespace)


def left_alone(plane: ControlPlane, folder: Path, namespace: str) -> tuple[float, float]:
    """Seconds until an operator that finds them all at work is ready, and what it then writes in
    REST_SECONDS, but for its Lease."""
    began = time.monotonic()
    operator = started(plane, folder / "rest", namespace)
    try:
        ready = time.monotonic() - began
        wait_until(operator.leads, what="the operator to lead", seconds=60)
        wait_until(
            lambda: "finetune_queue_depth 0.0" in operator.get("/metrics").text,
            what="the first passes",
            seconds=600,
        )
        wait_until(partial(pods_are_made, plane, namespace), what="all pods", seconds=600)
        time.sleep(SETTLED_SECONDS)
        before = requests(operator)
        time.sleep(REST_SECONDS)  # what it does meanwhile is what is measured
        after = requests(operator)
    finally:
        operator.stop()
    return ready, sum(after.get(verb, 0) - before.get(verb, 0) for verb in WRITES - {"PUT"})


async def run(counts: list[int], lives: int, rate: float) -> dict[str, Any]:
    """Measure and print; all figures."""
    found: dict[str, Any] = {"cpus": os.cpu_count(), "workers": WORKERS}
    with tempfile.TemporaryDirectory(prefix="operator-") as name:
        folder = Path(name)
        if counts:
            await _run_stages(folder, counts, rate, found)
        if lives:
            lived = await live(folder / "lives", lives)
            found["lives"] = asdict(lived)
            asked = ", ".join(f"{n:.1f} {verb}" for verb, n in sorted(lived.requests.items()))
            print(f"\n{lives} lives: {lived.seconds:.1f} s, {lives / lived.seconds:.1f} a second;")
            print(f"for each {asked}, {1000 * lived.cpu / lives:.1f} ms of CPU;")
            print(f"{lived.memory / 2**20:.0f} MiB resident; {lived.left} objects are left over")
    return found


async def _run_stages(folder: Path, counts: list[int], rate: float, found: dict[str, Any]) -> None:
    with ControlPlane(folder / "plane") as plane:
        install(plane)
        os.environ["KUBECONFIG"] = str(plane.kubeconfig)
        async with Cluster.connect(60, lambda *_: None) as cluster:
            found["kubernetes"] = plane.version
            print(f"Kubernetes {plane.version}, {os.cpu_count()} CPUs, {WORKERS} workers\n")
            print(HEAD)
            found["stages"] = []
            for count in counts:
                figures = await compare(plane, cluster, folder, count)
                found["stages"].append(asdict(figures))
                print(_row(figures), flush=True)
            median, late = await steadily(plane, cluster, folder, rate)
            print(f"\nat {rate:g} a second: {median:.2f} s to the Job, 99% within {late:.2f} s")
            ready, written = left_alone(plane, folder, f"ours-{counts[-1]}")
            print(f"started anew with {counts[-1]}: ready after {ready:.1f} s")
            print(f"left alone for {REST_SECONDS} s: {written:.0f} writes but for its Lease")
            found["steady"] = {"rate": rate, "median": median, "p99": late}
            found["rest"] = {"count": counts[-1], "ready": ready, "writes": written}


HEAD = (
    "    jobs  directly      ours  ratio  jobs/s  writes each  resident  CPU each: directly, ours"
)


def _row(found: Figures) -> str:
    ratio, rate = found.ours / found.direct, found.count / found.ours
    times = f"{found.count:8} {found.direct:7.1f} s {found.ours:7.1f} s {ratio:6.2f} {rate:7.1f}"
    used = [1000 * each / found.count for each in (found.direct_cpu, found.cpu)]
    memory = f"{found.writes:12.1f} {found.memory / 2**20:6.0f} MiB"
    return f"{times} {memory} {used[0]:14.1f} ms {used[1]:7.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.operator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--jobs", type=int, nargs="*", default=[100, 1000])
    parser.add_argument("--lives", type=int, default=0, help="whole lives on kwok (none)")
    parser.add_argument("--rate", type=float, default=10, help="FineTuneJobs a second (10)")
    parser.add_argument("--output", type=Path, help="where to write all figures as JSON")
    options = parser.parse_args()
    found = asyncio.run(run(options.jobs, options.lives, options.rate))
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
