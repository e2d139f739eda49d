"""doctor: whether the cluster is ready for FineTuneJobs, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from finetune_cli.bucket import Bucket
from finetune_cli.cluster import Cluster, JsonObject
from finetune_cli.commands.results import Endpoint
from finetune_cli.exits import CliError, ExitCode
from finetune_cli.job import Job
from finetune_cli.options import Output, on_cluster
from finetune_cli.output import Form, bytes_in_words, show_object

GOOD, BAD, UNKNOWN = "ok", "wrong", "unknown"
MARKS = {GOOD: "+", BAD: "x", UNKNOWN: "?"}
OPERATOR_LABEL = "app.kubernetes.io/name=finetune-operator"
GPU_PRODUCT, GPU_MEMORY = (
    "nvidia.com/gpu.product",
    "nvidia.com/gpu.memory",
)  # of GPU feature discovery
NEEDED = (
    *(
        ("finetune.dev", "finetunejobs", verb)
        for verb in ("get", "list", "watch", "create", "patch")
    ),
    ("", "pods", "list"),
    ("", "pods/log", "get"),
    ("", "events", "list"),
)
MOST_NAMED = 5


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    verdict: str
    what: str
    told: str


@on_cluster
def doctor(
    cluster: Cluster,
    name: Annotated[
        str | None, typer.Argument(help="A job whose bucket is to be looked at too.")
    ] = None,
    endpoint: Endpoint = None,
    output: Output = Form.TABLE,
) -> None:
    """Say what is ready in the cluster, and what is missing.

    Ends with 1 where something is wrong.
    """
    findings = list(_findings(cluster, name, endpoint))
    if output in (Form.JSON, Form.YAML):
        show_object([vars(each) for each in findings], output)
    else:
        for each in findings:
            typer.echo(f"{MARKS[each.verdict]} {each.what}: {each.told}")
    if any(each.verdict == BAD for each in findings):
        raise typer.Exit(ExitCode.FAILED)


def _findings(cluster: Cluster, name: str | None, endpoint: str | None) -> Iterator[Finding]:
    yield _api_server(cluster)
    yield _definition(cluster)
    yield _operator(cluster)
    yield _gpus(cluster)
    yield _kueue(cluster)
    yield _rights(cluster)
    if name is not None:
        yield _store(Job(cluster.job(name)), endpoint)


def _api_server(cluster: Cluster) -> Finding:
    found = cluster.request("GET", "/version")["gitVersion"]
    where = f"context {cluster.context}, namespace {cluster.namespace}"
    return Finding(GOOD, "API server", f"{found} at {cluster.server} ({where})")


def _definition(cluster: Cluster) -> Finding:
    """The Kind as it is installed, against the one that this command knows."""
    what = "FineTuneJob"
    try:
        found = cluster.request(
            "GET",
            "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/finetunejobs.finetune.dev",
        )
    except CliError as error:
        if error.code is ExitCode.NOT_FOUND:
            return Finding(BAD, what, "is not installed: helm install finetune-operator first.")
        return _definition_unseen(cluster, what)
    from finetune_operator.api.crd import custom_resource_definition

    ours = set(_fields(custom_resource_definition()["spec"]["versions"][0]))
    theirs = set(_fields(found["spec"]["versions"][0]))
    if ours == theirs:
        return Finding(GOOD, what, "is installed, with the fields that this command knows")
    lacks, more = sorted(ours - theirs), sorted(theirs - ours)
    if lacks:
        told = f"is older than this command, and lacks {_some(lacks)}: apply the chart's crds."
        return Finding(BAD, what, told)
    return Finding(GOOD, what, f"is newer than this command, which doesn't know {_some(more)}")


def _definition_unseen(cluster: Cluster, what: str) -> Finding:
    """Without the right to read the definition: whether the API is served at all."""
    try:
        cluster.request("GET", "/apis/finetune.dev/v1alpha1")
    except CliError as error:
        if error.code is ExitCode.NOT_FOUND:
            return Finding(BAD, what, "is not installed: helm install finetune-operator first.")
        return Finding(UNKNOWN, what, error.message)
    return Finding(GOOD, what, "is installed (its fields can't be read with your rights)")


def _fields(schema: JsonObject) -> Iterator[str]:
    """Paths of the fields of spec and status."""

    def walk(node: Any, path: str) -> Iterator[str]:
        for name, below in (node.get("properties") or {}).items():
            here = f"{path}.{name}" if path else name
            yield here
            yield from walk(below, here)
        if isinstance(node.get("items"), dict):
            yield from walk(node["items"], f"{path}[]")

    parts = schema["schema"]["openAPIV3Schema"]["properties"]
    for part in ("spec", "status"):
        yield from walk(parts[part], part)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _operator(cluster: Cluster) -> Finding:
    """Its Deployment by label, or the Lease that the one that acts renews."""
    what = "operator"
    query = {"labelSelector": OPERATOR_LABEL}
    try:
        found = cluster.request("GET", "/apis/apps/v1/deployments", query=query)["items"] or []
        if found:
            return _deployment(found[0])
        leases = cluster.request("GET", "/apis/coordination.k8s.io/v1/leases")["items"] or []
    except CliError as error:
        return Finding(UNKNOWN, what, error.message)
    for lease in leases:
        if lease["metadata"]["name"].endswith("finetune-operator") and _renewed(lease):
            holder = lease["spec"].get("holderIdentity")
            return Finding(GOOD, what, f"{holder} acts (Lease {lease['metadata']['namespace']})")
    return Finding(BAD, what, "none runs: no Deployment and no Lease of it in any namespace.")


def _deployment(found: JsonObject) -> Finding:
    meta, status = found["metadata"], found.get("status") or {}
    image = found["spec"]["template"]["spec"]["containers"][0]["image"]
    ready = status.get("readyReplicas") or 0
    told = (
        f"{ready} of {found['spec'].get('replicas', 1)} pods of {meta['namespace']}/{meta['name']}"
    )
    if not ready:
        return Finding(BAD, "operator", f"{told} are ready ({image}): kubectl describe it.")
    return Finding(GOOD, "operator", f"{told} ready, {image}")


def _renewed(lease: JsonObject) -> bool:
    """Whether somebody holds it now."""
    spec = lease["spec"]
    if not spec.get("holderIdentity") or not spec.get("renewTime"):
        return False
    length = timedelta(seconds=2 * int(spec.get("leaseDurationSeconds") or 15))
    return datetime.now(UTC) - datetime.fromisoformat(spec["renewTime"]) < length


def _gpus(cluster: Cluster) -> Finding:
    what = "GPUs"
    try:
        nodes = cluster.request("GET", "/api/v1/nodes")["items"] or []
    except CliError as error:
        return Finding(UNKNOWN, what, error.message)
    told = []
    for node in nodes:
        allocatable = (node.get("status") or {}).get("allocatable") or {}
        count = sum(int(n) for key, n in allocatable.items() if key.endswith("/gpu"))
        if count:
            labels = node["metadata"].get("labels") or {}
            memory = labels.get(GPU_MEMORY)
            size = bytes_in_words(int(memory) << 20) if memory else "memory unknown"
            product = labels.get(GPU_PRODUCT, "GPU")
            told.append(f"{node['metadata']['name']} {count} x {product} ({size})")
    if not told:
        return Finding(UNKNOWN, what, "no node offers one; small models train on a CPU.")
    unlabelled = (
        ""
        if "memory unknown" not in " ".join(told)
        else ("; GPU feature discovery would label their memory")
    )
    return Finding(GOOD, what, f"{_some(told)}{unlabelled}")


def _kueue(cluster: Cluster) -> Finding:
    try:
        cluster.request("GET", "/apis/kueue.x-k8s.io")
    except CliError as error:
        if error.code is ExitCode.NOT_FOUND:
            return Finding(GOOD, "Kueue", "is not installed; spec.queueName would wait for it")
        return Finding(UNKNOWN, "Kueue", error.message)
    return Finding(GOOD, "Kueue", "is installed, for spec.queueName")


def _rights(cluster: Cluster) -> Finding:
    lacks = [
        f"{verb} {resource}"
        for group, resource, verb in NEEDED
        if not cluster.may(verb, resource, group)
    ]
    if lacks:
        told = f"you may not {', '.join(lacks)} in {cluster.namespace}: ask for the role edit."
        return Finding(BAD, "rights", told)
    return Finding(GOOD, "rights", f"all that is needed in namespace {cluster.namespace}")


def _store(job: Job, endpoint: str | None) -> Finding:
    """Whether the user's own keys can read what a job has made."""
    uri = f"{str(job.spec['output']['uri']).rstrip('/')}/owner.json"
    try:
        Bucket.of(job, endpoint).read(uri)
    except CliError as error:
        if error.code is ExitCode.NOT_FOUND:
            return Finding(UNKNOWN, "store", f"nothing of {job.name} is there yet: {error.message}")
        return Finding(BAD, "store", error.message)
    return Finding(GOOD, "store", f"you can read {job.spec['output']['uri']}")
