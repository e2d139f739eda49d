"""What is read from a Pod as the kubelet and the control plane write it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_operator.pods import ObservedPod, Waiting, observe_pod
from tests.unit.operator.raw import (
    RESULT,
    container,
    expected_pod,
    moment,
    observed,
    observed_pod,
    raw_pod,
    terminated,
)

PODS = [
    pytest.param({}, expected_pod(), id="a pod without a status"),
    pytest.param(
        {
            "phase": "Pending",
            "conditions": [
                {
                    "type": "PodScheduled",
                    "status": "False",
                    "reason": "Unschedulable",
                    "message": "0/1 nodes are available",
                }
            ],
        },
        expected_pod(unschedulable="0/1 nodes are available"),
        id="a pod that no node takes",
    ),
    pytest.param(
        {
            "phase": "Pending",
            "startTime": "2026-11-24T12:01:00Z",
            **container(
                waiting={
                    "reason": "CreateContainerConfigError",
                    "message": 'secret "bucket" not found',
                }
            ),
        },
        expected_pod(
            since=moment("12:01:00"),
            waiting=Waiting("CreateContainerConfigError", 'secret "bucket" not found'),
        ),
        id="a container that waits for its Secret",
    ),
    pytest.param(
        {"phase": "Running", **container(running={"startedAt": "2026-11-24T12:00:05Z"})},
        expected_pod(phase="Running", started=True, started_at=moment("12:00:05")),
        id="a container that runs",
    ),
    pytest.param(
        {"phase": "Succeeded", **terminated(0, RESULT.to_message().decode(), "Completed")},
        expected_pod(
            phase="Succeeded",
            started=True,
            exit_code=0,
            finished_at=moment("12:09:00"),
            result=RESULT,
        ),
        id="a container that ended with its result",
    ),
    pytest.param(
        {
            "phase": "Failed",
            **terminated(1, 'Traceback:\n  File "x.py", line 1\nRuntimeError: no luck\n\n'),
        },
        expected_pod(
            phase="Failed",
            started=True,
            exit_code=1,
            finished_at=moment("12:09:00"),
            last_log_line="RuntimeError: no luck",
        ),
        id="a container that crashed with a stack trace",
    ),
    pytest.param(
        {"phase": "Failed", **terminated(137, reason="OOMKilled")},
        expected_pod(
            phase="Failed",
            started=True,
            exit_code=137,
            finished_at=moment("12:09:00"),
            oom_killed=True,
        ),
        id="a container that used too much memory",
    ),
    pytest.param(
        {
            "phase": "Failed",
            "reason": "Evicted",
            "message": "The node was low on resource: memory.",
        },
        expected_pod(phase="Failed", disruption="Evicted: The node was low on resource: memory."),
        id="a pod evicted from a node in need",
    ),
    pytest.param(
        {
            "phase": "Failed",
            "reason": "Evicted",
            "message": 'Usage of EmptyDir volume "workspace" exceeds the limit "1Gi". ',
        },
        expected_pod(
            phase="Failed",
            out_of_disk='Usage of EmptyDir volume "workspace" exceeds the limit "1Gi". ',
        ),
        id="a pod evicted for its own greed",
    ),
    pytest.param(
        {"phase": "Failed", "reason": "OutOfnvidia.com/gpu", "message": "Node didn't have enough"},
        expected_pod(phase="Failed", disruption="OutOfnvidia.com/gpu: Node didn't have enough"),
        id="a pod that its node did not let in",
    ),
    pytest.param(
        {
            "phase": "Failed",
            "conditions": [
                {
                    "type": "DisruptionTarget",
                    "status": "True",
                    "reason": "PreemptionByScheduler",
                    "message": "preempted by a greater pod",
                }
            ],
        },
        expected_pod(
            phase="Failed", disruption="PreemptionByScheduler: preempted by a greater pod"
        ),
        id="a pod that was preempted",
    ),
]


@pytest.mark.parametrize(("status", "expected"), PODS)
def test_pods(status: dict[str, Any], expected: ObservedPod) -> None:
    assert observed_pod(**status) == expected


def test_a_pod_that_is_being_deleted() -> None:
    pod = raw_pod(phase="Running")
    pod["spec"]["nodeName"] = "node-1"
    pod["metadata"]["deletionTimestamp"] = "2026-11-24T12:02:00Z"
    assert observed(pod).pod == expected_pod(
        phase="Running", deleting=True, delete_by=moment("12:02:00"), node="node-1"
    )


def test_the_secrets_that_a_pod_can_t_start_without_are_known_by_their_volumes() -> None:
    raw = raw_pod(**container(waiting={"reason": "ContainerCreating"}))
    raw["spec"]["volumes"] = [
        {"name": "workspace", "emptyDir": {}},
        {"name": "ca", "secret": {"secretName": "ca", "optional": True}},
        {"name": "signing-key", "secret": {"secretName": "signer"}},
    ]
    found = observe_pod(raw)
    assert found.secrets == {"signing-key": "signer"}
    assert found.mounts_secrets
    assert not replace(found, secrets={}).mounts_secrets
