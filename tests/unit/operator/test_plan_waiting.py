"""The plan while a pod can't start: what is waited for, what is hopeless, and what is said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_operator.api.observed import Phase
from finetune_operator.observe import ObservedJob, QueueState
from finetune_operator.plan import Plan
from finetune_operator.pods import Waiting
from finetune_trainer.contract import Reason
from tests.unit.operator.build import (
    EXPORT,
    PREPARE,
    TRAIN,
    at,
    dead,
    failing,
    finetunejob,
    job,
    pending,
    running,
    status,
    trouble,
    waiting_pod,
)
from tests.unit.operator.expect import (
    Case,
    decide,
    stop,
    stopped,
    unchanged,
    warning,
)

NOTHING_YET = (pending(TRAIN), pending(EXPORT))
PREPARING = status(Phase.PREPARING, PREPARE, running(PREPARE, since=-60), *NOTHING_YET)
CONFIG_ERROR = "CreateContainerConfigError"
NO_SECRET = Waiting(CONFIG_ERROR, 'secret "bucket" not found')
NO_KEY = Waiting(CONFIG_ERROR, "couldn't find key AWS_ACCESS_KEY_ID in Secret ml/bucket")
CREATE = "Create it; the pod then starts by itself."
MISSING = "The Secret bucket doesn't exist in this namespace, and the pod of prepare needs it."
REFUSAL = 'Error creating: pods "prepare-1-" is forbidden: exceeded quota: pods'
NO_NODE = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."


def waits(waiting: Waiting | None = None, **fields: Any) -> Any:
    return job(PREPARE, pod=waiting_pod(waiting=waiting, **fields))


def mounts(words: str | None) -> Any:
    creating = Waiting("ContainerCreating", "")
    return waits(creating, since=at(-40), secrets={"key": "bucket"}, mount_failure=words)


def says(
    reason: str,
    message: str,
    *,
    degraded: bool,
    phase: Phase = Phase.WAITING,
    requeue_after: float | None = None,
) -> Plan:
    """The job waits on, and says why."""
    return Plan(
        status(
            phase,
            PREPARE,
            running(PREPARE, since=-60),
            *NOTHING_YET,
            conditions=trouble(phase, (reason, message), (reason, message) if degraded else None),
        ),
        requeue_after=requeue_after,
    )


def fails(reason: Reason, message: str) -> Plan:
    """The job fails, and its Job, which would wait for ever, is stopped."""
    return Plan(
        status(
            Phase.FAILED,
            PREPARE,
            failing(PREPARE, reason, message),
            *NOTHING_YET,
            conditions=dead(reason, message),
        ),
        (stop(PREPARE),),
        (warning(reason, message), stopped(PREPARE)),
    )


def not_pulled(reason: str, words: str) -> str:
    return (
        f"The image trainer:1 of prepare can't be pulled ({reason}: {words}). Check its name "
        "(spec.stages.prepare.image, or the operator's setting) and the registry."
    )


def queued(state: QueueState | None, since: float = 0) -> ObservedJob:
    held: Any = {"suspended": True, "queue": "team-a", "queue_state": state}
    return job(PREPARE, pod=None, created=at(since), **held)


def looks_again(after: float) -> Plan:
    return says(
        "Queued",
        "prepare waits in Kueue's queue team-a.",
        degraded=False,
        phase=Phase.QUEUED,
        requeue_after=after,
    )


CASES = [
    Case(
        "a pod without a node says what the scheduler says, and is no trouble",
        finetunejob(PREPARING),
        [waits(unschedulable=NO_NODE)],
        says(
            "Unschedulable",
            f"The pod of prepare waits for a node: {NO_NODE}",
            degraded=False,
            phase=Phase.QUEUED,
        ),
    ),
    Case(
        "a Job that a queue holds back is queued, and is no trouble however long it takes",
        finetunejob(PREPARING),
        [job(PREPARE, pod=None, suspended=True, created=at(-9000))],
        says(
            "JobSuspended",
            "The Job prepare-1 is suspended: it waits for its turn in a queue, if it has one.",
            degraded=False,
            phase=Phase.QUEUED,
        ),
    ),
    Case(
        "a Job in Kueue's queue says what Kueue says, and looks again",
        finetunejob(PREPARING),
        [queued(QueueState("insufficient quota for nvidia.com/gpu"))],
        says(
            "Queued",
            "prepare waits in Kueue's queue team-a: insufficient quota for nvidia.com/gpu",
            degraded=False,
            phase=Phase.QUEUED,
            requeue_after=30,
        ),
    ),
    Case(
        "one that Kueue has said nothing of yet waits as well",
        finetunejob(PREPARING),
        [queued(None)],
        looks_again(3),
    ),
    Case(
        "as long again as it has",
        finetunejob(PREPARING),
        [queued(None, since=-12)],
        looks_again(12),
    ),
    Case(
        "but no longer than between looks at what Kueue says",
        finetunejob(PREPARING),
        [queued(None, since=-3600)],
        looks_again(30),
    ),
    Case(
        "a queue that lets nothing through needs a person",
        finetunejob(PREPARING),
        [queued(QueueState("LocalQueue team-a doesn't exist", admissible=False))],
        says(
            "Inadmissible",
            "prepare waits in Kueue's queue team-a: LocalQueue team-a doesn't exist. Have the "
            "queue set up, or set spec.queueName to another one.",
            degraded=True,
            phase=Phase.QUEUED,
            requeue_after=30,
        ),
    ),
    Case(
        "a container that is being created is waited for",
        finetunejob(PREPARING),
        [waits(Waiting("ContainerCreating", ""))],
        unchanged(PREPARING),
    ),
    Case(
        "a Secret that is missing for a moment is waited for, and is no trouble",
        finetunejob(PREPARING),
        [waits(NO_SECRET, since=at(-10))],
        says("SecretNotFound", f"{MISSING} {CREATE}", degraded=False, requeue_after=20),
    ),
    Case(
        "a Secret that stays missing is trouble, by name and with the remedy, but not the end",
        finetunejob(PREPARING),
        [waits(NO_SECRET, since=at(-30))],
        says("SecretNotFound", f"{MISSING} {CREATE}", degraded=True),
    ),
    Case(
        "a key that is missing in a Secret is named",
        finetunejob(PREPARING),
        [waits(NO_KEY, since=at(-31))],
        says(
            "SecretNotFound",
            "The Secret bucket has no key AWS_ACCESS_KEY_ID, and the pod of prepare needs it. "
            + CREATE,
            degraded=True,
        ),
    ),
    Case(
        "a pod that mounts a Secret is asked after until it starts",
        finetunejob(PREPARING),
        [mounts(None)],
        replace(unchanged(PREPARING), requeue_after=30),
    ),
    Case(
        "a mounted Secret that stays missing is trouble, by name and with the remedy",
        finetunejob(PREPARING),
        [mounts('MountVolume.SetUp failed for volume "key" : secret "bucket" not found')],
        says("SecretNotFound", f"{MISSING} {CREATE}", degraded=True, requeue_after=30),
    ),
    Case(
        "a key that is missing in a mounted Secret is named",
        finetunejob(PREPARING),
        [
            mounts(
                'MountVolume.SetUp failed for volume "key" : references non-existent secret key: k'
            )
        ],
        says(
            "SecretNotFound",
            f"The Secret bucket has no key k, and the pod of prepare needs it. {CREATE}",
            degraded=True,
            requeue_after=30,
        ),
    ),
    Case(
        "other trouble with a volume is told in the kubelet's words",
        finetunejob(PREPARING),
        [mounts("timed out waiting for the condition")],
        says(
            "FailedMount",
            "The pod of prepare can't start (FailedMount): timed out waiting for the condition",
            degraded=True,
            requeue_after=30,
        ),
    ),
    Case(
        "another mistake in the container's configuration is trouble",
        finetunejob(PREPARING),
        [waits(Waiting(CONFIG_ERROR, "volume x is odd"))],
        says(
            CONFIG_ERROR,
            f"The pod of prepare can't start ({CONFIG_ERROR}): volume x is odd",
            degraded=True,
        ),
    ),
    Case(
        "an image that can't be pulled is trouble, but the kubelet goes on trying",
        finetunejob(PREPARING),
        [waits(Waiting("ImagePullBackOff", "Back-off pulling image"))],
        says(
            "ImageNotPulled",
            not_pulled("ImagePullBackOff", "Back-off pulling image"),
            degraded=True,
        ),
    ),
    Case(
        "an image whose name is invalid fails the job",
        finetunejob(PREPARING),
        [waits(Waiting("InvalidImageName", "bad"))],
        fails(Reason.IMAGE_NOT_PULLED, not_pulled("InvalidImageName", "bad")),
    ),
    Case(
        "an image that may not be pulled and isn't there fails the job",
        finetunejob(PREPARING),
        [waits(Waiting("ErrImageNeverPull", "not present"))],
        fails(Reason.IMAGE_NOT_PULLED, not_pulled("ErrImageNeverPull", "not present")),
    ),
    Case(
        "a Job that its controller has not taken up is in its queue, however busy that is",
        finetunejob(PREPARING),
        [job(PREPARE, pod=None, created=at(-300))],
        says(
            "Queued",
            "The Job prepare-1 is in the queue of the Job controller.",
            degraded=False,
            phase=Phase.QUEUED,
            requeue_after=600,
        ),
    ),
    Case(
        "which is nothing to talk about at first",
        finetunejob(PREPARING),
        [job(PREPARE, pod=None, created=at(-10))],
        Plan(PREPARING, requeue_after=20),
    ),
    Case(
        "a Job controller that takes up no Job is trouble",
        finetunejob(PREPARING),
        [job(PREPARE, pod=None, created=at(-900))],
        says(
            "PodNotCreated",
            "The Job controller has not taken up the Job prepare-1 within 15 minutes. "
            "See whether kube-controller-manager is at work.",
            degraded=True,
        ),
    ),
    Case(
        "a Job that gets no pod is trouble",
        finetunejob(PREPARING),
        [job(PREPARE, pod=None, created=at(-300), taken_up=at(-30))],
        says(
            "PodNotCreated",
            "The Job prepare-1 has no pod yet. `kubectl describe job prepare-1` may say why.",
            degraded=True,
            requeue_after=30,
        ),
    ),
    Case(
        "which is told with the reason, where its controller says one",
        finetunejob(PREPARING),
        [job(PREPARE, pod=None, created=at(-300), taken_up=at(-30), refusal=REFUSAL)],
        says(
            "PodNotCreated",
            f"No pod can be created for the Job prepare-1: {REFUSAL}",
            degraded=True,
            requeue_after=30,
        ),
    ),
    Case(
        "what was trouble is none any more when the pod runs",
        finetunejob(says("ImageNotPulled", "x", degraded=True).status),
        [job(PREPARE)],
        unchanged(PREPARING),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.says)
def test_plan(case: Case) -> None:
    assert decide(case) == case.plan
