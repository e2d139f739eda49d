"""What the operator tells `prepare` of the hardware that the training will have."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.resources import memory_label, training_hardware
from finetune_trainer.contract import Hardware
from tests.unit.operator.build import spec

MEMORY = "nvidia.com/gpu.memory"
A10 = {MEMORY: "23028", "gpu": "a10"}
H100 = {MEMORY: "81559", "gpu": "h100"}
REQUIRED: dict[str, Any] = {
    "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}
}


def training(limits: dict[str, Any], memory: str | None = None, **train: Any) -> Any:
    stages = {"train": {"resources": {"limits": limits}, **train}}
    return spec(stages=stages, training={"gpuMemory": memory} if memory else {})


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        pytest.param({}, Hardware(), id="nothing is said"),
        pytest.param({"nvidia.com/gpu": 2}, Hardware(gpus=2), id="a number"),
        pytest.param({"nvidia.com/gpu": "2"}, Hardware(gpus=2), id="a number as text"),
        pytest.param({"amd.com/gpu": 4}, Hardware(gpus=4), id="AMD"),
        pytest.param(
            {"nvidia.com/mig-3g.20gb": 1},
            Hardware(gpus=1, gpu_memory_bytes=35 << 29),
            id="a slice",
        ),
        pytest.param({"nvidia.com/gpu.shared": 1}, Hardware(gpus=1), id="a shared one"),
        pytest.param({"nvidia.com/gpu": "some"}, Hardware(), id="no quantity"),
        pytest.param(
            {"memory": "1.5Gi", "ephemeral-storage": "100G", "cpu": 4},
            Hardware(memory_bytes=3 << 29, ephemeral_storage_bytes=100_000_000_000),
            id="memory and disk",
        ),
        pytest.param({"memory": 1000}, Hardware(memory_bytes=1000), id="bytes as a number"),
        pytest.param({"memory": "lots"}, Hardware(), id="no quantity of memory"),
    ],
)
def test_limits_are_read_as_kubernetes_reads_them(
    limits: dict[str, Any], expected: Hardware
) -> None:
    assert training_hardware(training(limits)) == expected


@pytest.mark.parametrize(
    ("resource", "gib"),
    [
        # What NVIDIA's MIG user guide says that the slices have.
        ("mig-1g.5gb", 4.75),
        ("mig-3g.20gb", 19.5),
        ("mig-1g.10gb.me", 9.5),
        ("mig-7g.80gb", 78.5),
        ("mig-1g.18gb", 16.0),
    ],
)
def test_a_slice_whose_nodes_say_nothing_has_what_its_name_says(resource: str, gib: float) -> None:
    named = gpu_memory(training({f"nvidia.com/{resource}": 1}))
    assert named is not None
    assert 0.88 * gib <= named / 1024 <= gib


def test_a_slice_that_several_pods_share_has_no_memory_of_its_own() -> None:
    assert gpu_memory(training({"nvidia.com/mig-1g.5gb.shared": 1})) is None


def test_a_node_that_tells_a_slices_memory_is_believed_before_its_name() -> None:
    slices = {"nvidia.com/mig-3g.20gb": 1}
    assert gpu_memory(training(slices), {"nvidia.com/mig-3g.20gb.memory": "19968"}) == 19968
    assert gpu_memory(training(slices, memory="19Gi")) == 19 << 10


CLAIM = {"name": "gpu", "resourceClaimTemplateName": "one-gpu"}


def test_the_gpus_of_resource_claims_count() -> None:
    assert training_hardware(training({}, resourceClaims=[CLAIM])) == Hardware(gpus=1)
    claims = [{**CLAIM, "gpus": 4}, {"name": "network", "resourceClaimName": "nic", "gpus": 0}]
    told = training_hardware(training({}, memory="80Gi", resourceClaims=claims))
    assert told == Hardware(gpus=4, gpu_memory_bytes=80 << 30)


def test_no_label_tells_the_memory_of_a_claimed_gpu() -> None:
    assert memory_label(training({}, resourceClaims=[CLAIM])) is None
    assert memory_label(training(ONE, resourceClaims=[CLAIM])) is None


def test_another_claim_is_another_hardware() -> None:
    before = training({}).hardware_digest
    one = training({}, resourceClaims=[CLAIM]).hardware_digest
    assert (
        len({before, one, training({}, resourceClaims=[{**CLAIM, "gpus": 2}]).hardware_digest}) == 3
    )


def test_the_disk_of_the_export_is_told_as_well() -> None:
    disk = {"resources": {"limits": {"ephemeral-storage": "2Gi"}}}
    assert training_hardware(spec(stages={"export": disk})) == Hardware(
        export_storage_bytes=2 << 30
    )


@pytest.mark.parametrize(
    ("workspace", "size"),
    [
        ({"storage": "200Gi"}, 200 << 30),
        ({"sizeLimit": "1Gi"}, 1 << 30),
        ({"sizeLimit": "20Gi"}, 2 << 30),
        ({}, 2 << 30),
    ],
)
def test_the_workspace_limits_the_disk(workspace: dict[str, str], size: int) -> None:
    limits = {"resources": {"limits": {"ephemeral-storage": "2Gi"}}}
    train = {**limits, "workspace": workspace}
    assert training_hardware(spec(stages={"train": train})).ephemeral_storage_bytes == size


def gpu_memory(spec: Any, *nodes: dict[str, str]) -> int | None:
    found = training_hardware(spec, nodes).gpu_memory_bytes
    return found and found >> 20


ONE = {"nvidia.com/gpu": 1}


def test_the_smallest_gpu_that_the_pod_may_get_counts() -> None:
    assert gpu_memory(training(ONE), H100, A10) == 23028
    assert gpu_memory(training(ONE, nodeSelector={"gpu": "h100"}), H100, A10) == 81559


def test_no_fitting_node_tells_nothing() -> None:
    assert gpu_memory(training(ONE, nodeSelector={"gpu": "b200"}), H100, A10) is None
    assert gpu_memory(training(ONE)) is None


def test_nodes_without_a_usable_label_are_left_out() -> None:
    assert gpu_memory(training(ONE), {"gpu": "h100"}, {MEMORY: "plenty"}, {MEMORY: "0"}) is None
    assert gpu_memory(training(ONE), {"gpu": "h100"}, {MEMORY: "plenty"}, H100) == 81559


def test_the_spec_has_the_last_word() -> None:
    assert gpu_memory(training(ONE, memory="24Gi"), H100) == 24 << 10
    assert memory_label(training(ONE, memory="24Gi")) is None


def test_without_a_gpu_there_is_no_gpu_memory() -> None:
    assert gpu_memory(training({}, memory="24Gi"), H100) is None


@pytest.mark.parametrize(
    ("limits", "label"),
    [
        pytest.param({"cpu": 4}, None, id="no GPU"),
        pytest.param(ONE, "nvidia.com/gpu.memory", id="a whole GPU"),
        pytest.param({"nvidia.com/mig-3g.40gb": 1}, "nvidia.com/mig-3g.40gb.memory", id="a slice"),
        pytest.param({"nvidia.com/gpu.shared": 1}, None, id="a shared GPU"),
        pytest.param({"amd.com/gpu": 1}, None, id="AMD"),
        pytest.param({"nvidia.com/gpu": 1, "nvidia.com/mig-1g.5gb": 1}, None, id="two kinds"),
    ],
)
def test_which_label_tells_the_memory(limits: dict[str, Any], label: str | None) -> None:
    assert memory_label(training(limits)) == label


def test_nodes_chosen_by_affinity_are_not_guessed() -> None:
    assert memory_label(training(ONE, affinity={"nodeAffinity": REQUIRED})) is None
    assert memory_label(training(ONE, affinity={"nodeAffinity": {}})) == MEMORY
    assert memory_label(training(ONE, affinity={"podAffinity": {}})) == MEMORY
