"""What nodes have to do with it: GPU memory from their labels, and pods that take time to stop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
import yaml

from finetune_trainer.contract import Hardware, Reason, RunConfig, Stage, StageResult
from hack.cluster.control_plane import ControlPlane
from tests.integration.operator.stage import Namespace, prepared, resolved, trained

PREPARE, TRAIN = Stage.PREPARE, Stage.TRAIN
STOPPED = StageResult(stage=TRAIN, reason=Reason.STOPPED, message="Stopped at step 5.")


def node(name: str, **labels: str) -> dict[str, Any]:
    labels = {key.replace("_", "/"): value for key, value in labels.items()}
    meta = {"name": name, "labels": labels}
    return {"apiVersion": "v1", "kind": "Node", "metadata": meta}


@pytest.fixture(scope="module")
def nodes(installed: ControlPlane) -> Iterator[str]:
    """Three nodes with GPUs; the name of the largest."""
    some = uuid4().hex[:8]
    memory = {"a10": "23028", "h100": "81559"}
    made = [
        node(f"{gpu}-{some}", **{"nvidia.com_gpu.memory": size, "gpu": gpu})
        for gpu, size in memory.items()
    ]
    made.append(node(f"unknown-{some}", gpu="h100"))
    installed.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(made))
    yield f"h100-{some}"
    installed.kubectl("delete", "nodes", *(each["metadata"]["name"] for each in made))


def told(here: Namespace) -> Hardware:
    """What run.json of `prepare` says of the hardware."""
    pod = here.pod(PREPARE)
    name = next(v["configMap"]["name"] for v in pod["spec"]["volumes"] if v["name"] == "config")
    found = here.plane.kubectl("get", "configmap", name, "-n", here.name, "-o", "json")
    hardware = RunConfig.model_validate_json(json.loads(found)["data"]["run.json"]).hardware
    assert hardware is not None
    return hardware


def with_gpus(count: int, **train: Any) -> dict[str, Any]:
    limits = {"nvidia.com/gpu": count, "memory": "64Gi"}
    return {"train": {"resources": {"limits": limits}, **train}}


def test_the_smallest_gpu_that_fits_is_told_to_prepare(here: Namespace, nodes: str) -> None:
    del nodes
    here.apply(stages=with_gpus(1))
    assert told(here) == Hardware(gpus=1, gpu_memory_bytes=23028 << 20, memory_bytes=64 << 30)


def test_the_node_selector_counts_and_several_gpus_share_memory(
    here: Namespace, nodes: str
) -> None:
    del nodes
    here.apply(stages=with_gpus(2, nodeSelector={"gpu": "h100"}))
    assert told(here) == Hardware(gpus=2, gpu_memory_bytes=81559 << 20, memory_bytes=64 << 30)
    here.succeed(prepared())
    spec = here.pod(TRAIN)["spec"]
    folders = {v["name"]: v["emptyDir"] for v in spec["volumes"] if "emptyDir" in v}
    assert folders["shared-memory"] == {"medium": "Memory", "sizeLimit": "8Gi"}
    assert spec["terminationGracePeriodSeconds"] == 120


def test_where_no_node_tells_its_gpus_memory_the_training_finds_out(here: Namespace) -> None:
    limits = {"amd.com/gpu": 1}
    here.apply(stages={"train": {"resources": {"limits": limits}}})
    assert told(here) == Hardware(gpus=1)


def test_a_training_gets_its_gpu_by_dynamic_resource_allocation(
    supported: ControlPlane, here: Namespace
) -> None:
    if supported.minor_version < 34:
        pytest.skip("Kubernetes has resourceClaims by default since 1.34")
    exactly = {"deviceClassName": "gpu.nvidia.com", "allocationMode": "ExactCount", "count": 1}
    template = {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaimTemplate",
        "metadata": {"name": "one-gpu", "namespace": here.name},
        "spec": {"spec": {"devices": {"requests": [{"name": "gpu", "exactly": exactly}]}}},
    }
    supported.kubectl("create", "-f", "-", input=json.dumps(template))
    claims = [{"name": "gpu", "resourceClaimTemplateName": "one-gpu"}]
    here.apply(stages={"train": {"resourceClaims": claims}}, training={"gpuMemory": "80Gi"})
    assert told(here) == Hardware(gpus=1, gpu_memory_bytes=80 << 30)
    here.succeed(prepared())
    pod = here.pod(TRAIN)
    assert pod["spec"]["resourceClaims"] == claims
    assert pod["spec"]["containers"][0]["resources"]["claims"] == [{"name": "gpu"}]
    made = here.wait("the pod's claim", lambda: owned(here, "resourceclaims", pod))
    assert made["spec"]["devices"]["requests"][0]["exactly"]["deviceClassName"] == "gpu.nvidia.com"
    here.start_pod(TRAIN)

    def counted() -> list[dict[str, Any]]:
        pods = here.status().get("usage", {}).get("pods", [])
        return [each for each in pods if each["stage"] == "train"]

    assert [each["gpus"] for each in here.wait("the pod to count", counted)] == [1]


def owned(here: Namespace, resource: str, pod: dict[str, Any]) -> Any:
    """The object that the control plane made for a pod."""
    found = json.loads(here.plane.kubectl("get", resource, "-n", here.name, "-o", "json"))["items"]
    return next(
        (
            each
            for each in found
            if pod["metadata"]["uid"] in [o["uid"] for o in each["metadata"]["ownerReferences"]]
        ),
        None,
    )


def training_on(here: Namespace, node: str) -> dict[str, Any]:
    """The pod of a training that runs on a node."""
    here.apply()
    here.succeed(prepared())
    pod = here.start_pod(TRAIN)
    here.bind(pod, node)
    return pod


def test_a_training_of_a_new_spec_waits_until_the_old_ones_pod_has_stopped(
    here: Namespace, nodes: str
) -> None:
    old = training_on(here, nodes)
    here.apply(training={"learningRate": 1e-4})
    here.succeed(prepared(PREPARE, found=resolved(train="train-b", export="export-b")))
    leaving = here.wait("the old pod to be told to stop", lambda: _leaving(here))
    assert leaving["metadata"]["uid"] == old["metadata"]["uid"]
    assert leaving["metadata"]["deletionGracePeriodSeconds"] == 120
    here.wait("the new one to wait", lambda: here.condition("Progressing")[1] == "Stopping")
    assert [job for job in here.jobs() if job[0] == "train"] == []
    here.remove_pod(old)
    assert here.pod(TRAIN)["metadata"]["uid"] != old["metadata"]["uid"]


def test_a_job_deleted_and_created_anew_waits_for_the_pod_of_the_deleted_one(
    here: Namespace, nodes: str
) -> None:
    old = training_on(here, nodes)
    here.delete()
    here.wait("the old pod to be told to stop", lambda: _leaving(here))
    here.apply()
    here.succeed(prepared(PREPARE))
    here.wait("the new job to wait", lambda: here.condition("Progressing")[1] == "Stopping")
    assert [job for job in here.jobs() if job[0] == "train"] == []
    here.remove_pod(old)
    assert here.pod(TRAIN)["metadata"]["uid"] != old["metadata"]["uid"]


@pytest.mark.parametrize(
    "ending",
    [
        {"exitCode": 137},
        None,
        {"exitCode": 14, "message": STOPPED.to_message().decode()},
    ],
    ids=["killed", "never started", "stopped with a checkpoint"],
)
def test_a_pod_that_somebody_takes_away_costs_the_job_nothing(
    here: Namespace, nodes: str, ending: dict[str, Any] | None
) -> None:
    here.apply(backoffLimit=0)
    here.succeed(prepared())
    pod = here.start_pod(TRAIN) if ending else here.pod(TRAIN)
    here.bind(pod, nodes)
    here.delete_pod(pod)
    here.set_pod(pod, "Failed", {"terminated": ending} if ending else None)
    here.remove_pod(pod)
    following = here.another_pod(TRAIN, than=pod)
    # The Job controller lets the Job fail.
    assert following["metadata"]["labels"]["finetune.dev/attempt"] == "2"
    assert ("Warning", "PodDisrupted") in here.events()
    here.succeed(trained(), attempt=2)
    here.wait_phase("Exporting")
    assert here.stage(TRAIN)["failures"] == 0


def _leaving(here: Namespace) -> Any:
    pods = here.children("pods")
    return next((pod for pod in pods if "deletionTimestamp" in pod["metadata"]), None)


def test_keys_of_secrets_reach_the_pod_by_reference(here: Namespace) -> None:
    reference = {"secretKeyRef": {"name": "wandb", "key": "api-key", "optional": True}}
    here.apply(stages={"prepare": {"env": [{"name": "WANDB_API_KEY", "valueFrom": reference}]}})
    (container,) = here.pod(PREPARE)["spec"]["containers"]
    assert {"name": "WANDB_API_KEY", "valueFrom": reference} in container["env"]


@pytest.mark.usefixtures("older_definition")
def test_a_variable_without_a_value_is_explained(here: Namespace) -> None:
    here.apply(stages={"train": {"env": [{"name": "WANDB_API_KEY"}]}})
    here.wait_phase("Failed")
    _, reason, message = here.condition("Ready")
    assert reason == "InvalidSpec"
    assert "spec.stages.train.env.0: must have exactly one of value and valueFrom" in message
