"""Volumes on a real node: a cache of base models, a claim as workspace, and a model as an image.

It comes last: the operator has the cache from here on. PersistentVolumes are made by hand, since
nothing here provisions any.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hack import state_dir
from hack.cluster.components import NODE_NAME
from hack.cluster.native import NativeCluster
from hack.cluster.node import containerd_version
from hack.demo.environment import NAMESPACE, Environment, image_settings, install_operator
from hack.demo.follow import poll, ready_message
from hack.images.build import build_images
from hack.process import Unavailable
from tests.e2e.jobs import Job, apply, pods_of, stage_of_pod, wait
from tests.fixtures import leave_out
from tests.integration.trainer.registry import RunningRegistry, program, running_registry

FIRST, SECOND, FROM_IMAGE = "first", "second", "from-image"
CACHE, SCRATCH = "models", "scratch"

pytestmark = pytest.mark.timeout(1800)


def volume(folder: Path, *, claim: str = "", storage_class: str = "") -> list[Job]:
    """A folder of the node as a PersistentVolume, with the claim that it is for, if any."""
    folder.mkdir(parents=True)
    here = {"key": "kubernetes.io/hostname", "operator": "In", "values": [NODE_NAME]}
    size, modes = {"storage": "1Gi"}, ["ReadWriteMany", "ReadWriteOnce"]
    spec: Job = {
        "capacity": size,
        "accessModes": modes,
        "persistentVolumeReclaimPolicy": "Retain",
        "storageClassName": storage_class,
        "local": {"path": str(folder)},
        "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}},
    }
    core = {"apiVersion": "v1"}
    made = {**core, "kind": "PersistentVolume", "metadata": {"name": folder.name}, "spec": spec}
    if not claim:
        return [made]
    spec["claimRef"] = {"name": claim, "namespace": NAMESPACE}
    wanted = {
        "accessModes": modes[:1],
        "storageClassName": storage_class,
        "volumeName": folder.name,
        "resources": {"requests": size},
    }
    metadata = {"name": claim, "namespace": NAMESPACE}
    claimed = {**core, "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": wanted}
    return [made, claimed]


@pytest.fixture(scope="module")
def folder(environment: Environment) -> Path:
    """Where the volumes are, on an operator that has the cache."""
    if not isinstance(environment.cluster, NativeCluster):
        pytest.skip("it looks into the native node's folders: FINETUNE_CLUSTER=native")
    found = state_dir(environment.name) / "volumes"
    by_hand: Job = {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": SCRATCH},
        "provisioner": "kubernetes.io/no-provisioner",
        "volumeBindingMode": "WaitForFirstConsumer",
    }
    objects = [
        by_hand,
        *volume(found / CACHE, claim=CACHE),
        *volume(found / SCRATCH, storage_class=SCRATCH),
    ]
    for each in objects:
        environment.kubectl("apply", "-f", "-", input=json.dumps(each))
    cache = {"persistentVolumeClaim": {"claimName": CACHE}}
    install_operator(environment.cluster, {**image_settings(build_images()), "modelCache": cache})
    return found


@pytest.fixture(scope="module")
def registry(
    environment: Environment, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningRegistry | None]:
    """A registry that pods and the node's containerd reach; None where there is no program."""
    try:
        program()
    except Unavailable:
        yield None
        return
    address = environment.cluster.node_address
    with running_registry(tmp_path_factory.mktemp("registry") / "it", None, address) as running:
        yield running


def train_on(environment: Environment, name: str, model: str, **spec: Any) -> None:
    """Apply a FineTuneJob that trains one epoch and exports the merged model."""
    made = {"model": {"source": model}, "export": {"merged": True, "gguf": []}, **spec}
    apply(environment, name, training={"epochs": 1}, **made)


def succeeded(environment: Environment, name: str) -> Job:
    """The job when it has succeeded."""
    *_, job = poll(environment.reader(name), 600)
    assert job["status"]["phase"] == "Succeeded", ready_message(job)
    return job


def fetched(environment: Environment, name: str) -> list[str]:
    """What the job's pods have fetched of the weights, by their logs."""
    logs = [
        environment.kubectl("logs", pod["metadata"]["name"]) for pod in pods_of(environment, name)
    ]
    assert len(logs) == 3, "prepare, train and export"
    return [line for log in logs for line in re.findall(r"Fetching s3://models/\S+", log)]


@pytest.fixture(scope="module")
def first(
    environment: Environment, folder: Path, one_layer: str, registry: RunningRegistry | None
) -> Job:
    """A job that finds the cache empty; its training works on a claim of its pod's own."""
    assert weights(folder) == []
    workspace = {"storage": "512Mi", "storageClassName": SCRATCH}
    output: Job = {"uri": f"s3://artifacts/{FIRST}"}
    if registry:
        output["oci"] = {"repository": f"{registry.host}/tuned", "insecure": True}
    train_on(
        environment, FIRST, one_layer, stages={"train": {"workspace": workspace}}, output=output
    )
    return succeeded(environment, FIRST)


def weights(folder: Path) -> list[tuple[int, int]]:
    """Each file of weights in the cache, by what changes when it is written anew."""
    found = (file.stat() for file in (folder / CACHE).rglob("*.safetensors"))
    return [(each.st_ino, each.st_ctime_ns) for each in found]


@pytest.mark.usefixtures("first")
def test_two_jobs_share_the_cache_and_the_model_is_fetched_once(
    environment: Environment, folder: Path, one_layer: str
) -> None:
    assert fetched(environment, FIRST) == [f"Fetching {one_layer}"], "train fetches, export finds"
    before = weights(folder)
    assert len(before) == 1
    train_on(environment, SECOND, one_layer)
    succeeded(environment, SECOND)
    assert fetched(environment, SECOND) == []
    assert weights(folder) == before


@pytest.mark.usefixtures("first")
def test_a_training_works_on_a_claim_of_its_pods_own_which_goes_with_the_job(
    environment: Environment, folder: Path
) -> None:
    (pod,) = [each for each in pods_of(environment, FIRST) if stage_of_pod(each) == "train"]
    claim = environment.get("persistentvolumeclaim", f"{pod['metadata']['name']}-workspace")
    assert (claim["status"]["phase"], claim["spec"]["volumeName"]) == ("Bound", SCRATCH)
    assert claim["metadata"]["ownerReferences"][0]["uid"] == pod["metadata"]["uid"]
    assert any((folder / SCRATCH).iterdir()), "it worked there"
    environment.kubectl("delete", "ftj", FIRST)
    wait(
        lambda: environment.get("persistentvolume", SCRATCH),
        "the end of the claim",
        lambda found: found["status"]["phase"] == "Released",
        120,
    )
    assert [each["metadata"]["name"] for each in environment.items("pvc")] == [CACHE]


def test_a_base_model_that_is_an_image_comes_from_the_registry_to_which_a_job_pushed_it(
    request: pytest.FixtureRequest,
    environment: Environment,
    registry: RunningRegistry | None,
    first: Job,
) -> None:
    if containerd_version() < 2:
        pytest.skip("image volumes need containerd 2.1: put its programs first on PATH")
    if registry is None:
        leave_out(request.config, "there is no docker-registry: put it on PATH")
    assert isinstance(environment.cluster, NativeCluster)
    environment.cluster.pull_without_tls(registry.host)
    asked = registry.requests("GET") + registry.requests("HEAD")
    (image,) = first["status"]["images"]
    train_on(environment, FROM_IMAGE, f"oci://{image['reference']}")
    succeeded(environment, FROM_IMAGE)
    assert fetched(environment, FROM_IMAGE) == []
    assert registry.requests("GET") + registry.requests("HEAD") > asked, "the node came to it"
