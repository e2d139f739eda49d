"""What a stage's pod says, parsed once into a frozen value.

Container states, conditions and the kubelet's reasons are known here and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from finetune_operator.api import labels
from finetune_trainer.contract import StageResult

Raw = Mapping[str, Any]

# Reasons in a pod's status with which the node or the control plane took the pod away, or did not
# let it in: nothing that the container did. Any `OutOf<resource>` belongs here as well.
DISRUPTIONS = {
    "Evicted",
    "NodeAffinity",
    "NodeLost",
    "NodeShutdown",
    "Preempted",
    "Preempting",
    "Shutdown",
    "Terminated",
    "UnexpectedAdmissionError",
}
# The kubelet evicts as well when a pod outgrows its own limits: that is the pod's doing.
OVERGROWN = re.compile(r"exceeds the (total )?limit|exceeded its local ephemeral storage limit")
ENDED = {"Succeeded", "Failed"}  # phases of a pod
LAST_WORDS_LIMIT = 300  # characters of a log line that is quoted to the user


@dataclass(frozen=True)
class Waiting:
    """Why a container doesn't run yet."""

    reason: str
    message: str


@dataclass(frozen=True)
class ObservedPod:
    """A pod of a stage's Job."""

    name: str
    phase: str
    since: datetime
    """When the kubelet took it on; before that, when it was created."""

    image: str
    started: bool = False
    """Whether the trainer runs or has run."""

    waiting: Waiting | None = None
    exit_code: int | None = None
    finished_at: datetime | None = None
    result: StageResult | None = None
    last_words: str = ""
    """The last line of the log, where the container left no StageResult."""

    oom_killed: bool = False
    out_of_disk: str | None = None
    """The kubelet's words, where the pod outgrew its ephemeral storage."""

    disruption: str | None = None
    """Who took the pod away and why, where the trainer is not to blame."""

    unschedulable: str | None = None
    """The scheduler's words, while there is no node for it."""

    deleting: bool = False

    @property
    def at_work(self) -> bool:
        """Whether its trainer still runs; a pod that is being deleted has its grace period."""
        return self.started and self.exit_code is None and self.phase not in ENDED


def observe_pod(raw: Raw) -> ObservedPod:
    """Parse a pod."""
    meta, status = raw["metadata"], raw.get("status") or {}
    state = _trainer_state(status)
    ended = state.get("terminated") or {}
    waiting = state.get("waiting")
    result = StageResult.from_message(ended.get("message", ""))
    return ObservedPod(
        name=meta["name"],
        phase=status.get("phase", "Pending"),
        since=moment(status.get("startTime")) or created_at(raw),
        image=trainer_image(raw["spec"]),
        started="running" in state or "terminated" in state,
        waiting=_waiting(waiting) if waiting else None,
        exit_code=ended.get("exitCode"),
        finished_at=moment(ended.get("finishedAt")),
        result=result,
        last_words="" if result else _last_words(ended.get("message", "")),
        oom_killed=ended.get("reason") == "OOMKilled",
        out_of_disk=_out_of_disk(status),
        disruption=_disruption(status),
        unschedulable=_unschedulable(status),
        deleting="deletionTimestamp" in meta,
    )


def _trainer_state(status: Raw) -> Raw:
    """State of the trainer's container; sidecars that others injected don't count."""
    for container in status.get("containerStatuses") or []:
        if container["name"] == labels.CONTAINER:
            return container.get("state") or {}
    return {}


def _waiting(state: Raw) -> Waiting:
    return Waiting(state.get("reason", ""), state.get("message", ""))


def _last_words(message: str) -> str:
    """The last line of a log: of a stack trace, the one that says what happened."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1][:LAST_WORDS_LIMIT] if lines else ""


def _out_of_disk(status: Raw) -> str | None:
    message = status.get("message") or ""
    return message if status.get("reason") == "Evicted" and OVERGROWN.search(message) else None


def _disruption(status: Raw) -> str | None:
    if _out_of_disk(status) is not None:
        return None
    reason, message = status.get("reason") or "", status.get("message") or ""
    if reason in DISRUPTIONS or reason.startswith("OutOf"):
        return f"{reason}: {message}" if message else reason
    for condition in true_conditions(status):
        if condition["type"] == "DisruptionTarget":
            why, text = condition.get("reason") or "Disrupted", condition.get("message") or ""
            return f"{why}: {text}" if text else why
    return None


def _unschedulable(status: Raw) -> str | None:
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition.get("reason") == "Unschedulable":
            return str(condition.get("message") or "no node fits")
    return None


def true_conditions(status: Raw) -> list[Raw]:
    """The conditions that hold, of any object's status."""
    return [c for c in status.get("conditions") or [] if c.get("status") == "True"]


def trainer_image(pod_spec: Raw) -> str:
    """The image of the trainer's container."""
    for container in pod_spec["containers"]:
        if container["name"] == labels.CONTAINER:
            return str(container["image"])
    return ""


def created_at(raw: Raw) -> datetime:
    """When an object was created."""
    return moment(raw["metadata"].get("creationTimestamp")) or datetime.min.replace(tzinfo=UTC)


def moment(text: str | None) -> datetime | None:
    """A time as Kubernetes writes it."""
    return datetime.fromisoformat(text) if text else None
