"""What a stage's pod says, parsed once: how Kubernetes writes states, conditions and reasons."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from finetune_operator.api import GPUS_ANNOTATION, TRAINER_CONTAINER, JsonObject
from finetune_trainer.contract import StageResult

# Reasons in a pod's status for which the container is not to blame: the node or the control plane
# removed the pod or did not admit it. `OutOf<resource>` is another, for any resource.
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
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
# The kubelet also evicts a pod that exceeds its own limits, and then the pod is to blame.
OVERGROWN = re.compile(r"exceeds the (total )?limit|exceeded its local ephemeral storage limit")
# What the kubelet says when a Secret or its key is missing.
SECRET_MISSING = re.compile(r'secret "(?P<name>[^"]+)" not found', re.IGNORECASE)
KEY_MISSING = re.compile(r"find key (?P<key>\S+) in Secret \S*?/(?P<name>\S+)", re.IGNORECASE)
# The same of one that is mounted, whose name the kubelet leaves out (pkg/volume/secret).
MOUNT_KEY_MISSING = re.compile(
    r'volume "(?P<volume>[^"]+)".* non-existent secret key: (?P<key>\S+)', re.DOTALL
)

UNSCHEDULED = {"Unschedulable", "SchedulingGated"}  # no node fits, or a queue holds the pod
ENDED = {"Succeeded", "Failed"}  # phases of a pod
LOG_LINE_LIMIT = 300  # characters of a log line that is quoted to the user


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
    """When the kubelet accepted it, or else when it was created."""

    image: str
    started: bool = False
    """Whether the trainer runs or has run."""

    waiting: Waiting | None = None
    exit_code: int | None = None
    finished_at: datetime | None = None
    result: StageResult | None = None
    last_log_line: str = ""
    """The last line of the log, if the container left no StageResult."""

    oom_killed: bool = False
    out_of_disk: str | None = None
    """The kubelet's message, if the pod exceeded its ephemeral storage."""

    disruption: str | None = None
    """Who removed the pod and why, if the trainer is not to blame."""

    unschedulable: str | None = None
    """The scheduler's message, while no node fits."""

    deleting: bool = False
    delete_by: datetime | None = None
    """When a pod that is being deleted should be gone, its grace period included."""

    forced: bool = False
    """Whether somebody deleted it by force, and so vouches that it doesn't run any more. The Job's
    finalizer keeps its object."""

    node: str | None = None
    created: datetime | None = None
    started_at: datetime | None = None
    """When the trainer began to run, by the node's clock."""

    resources: Mapping[str, int | str] = field(default_factory=dict)
    """What the trainer's container requests, or else may use at most."""

    claimed_gpus: int = 0
    """The GPUs of its resource claims."""

    uid: str = ""
    secrets: Mapping[str, str] = field(default_factory=dict)
    """The Secrets that it can't start without, by the volume that each is mounted from."""

    mount_failure: str | None = None
    """Why the kubelet can't mount its volumes, in the kubelet's words."""

    @property
    def mounts_secrets(self) -> bool:
        """Whether a Secret may be what its containers wait for."""
        waits = self.waiting is not None and self.waiting.reason == "ContainerCreating"
        return bool(self.secrets) and waits

    @property
    def missing_secret(self) -> str | None:
        """Which Secret isn't there, or not whole, by the kubelet's words."""
        words = self.mount_failure or ""
        if self.waiting is not None and self.waiting.reason == "CreateContainerConfigError":
            words = self.waiting.message
        if found := KEY_MISSING.search(words):
            return f"The Secret {found['name']} has no key {found['key']}"
        found = MOUNT_KEY_MISSING.search(words)
        if found and found["volume"] in self.secrets:
            return f"The Secret {self.secrets[found['volume']]} has no key {found['key']}"
        found = SECRET_MISSING.search(words)
        return f"The Secret {found['name']} doesn't exist in this namespace" if found else None

    @property
    def has_ended(self) -> bool:
        """Whether its trainer has ended, or never ran and never will."""
        return self.exit_code is not None or self.phase in ENDED or self.forced

    @property
    def at_work(self) -> bool:
        """Whether its trainer still runs, maybe in the grace period of a deleted pod."""
        return self.started and not self.has_ended

    @property
    def may_work(self) -> bool:
        """Whether its trainer runs or may yet be started; a deleted pod is not started any more."""
        begins = not self.started and not self.deleting and not self.has_ended
        return self.at_work or begins


def observe_pod(raw: JsonObject) -> ObservedPod:
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
        last_log_line="" if result else _last_log_line(ended.get("message", "")),
        oom_killed=ended.get("reason") == "OOMKilled",
        out_of_disk=_out_of_disk(status),
        disruption=_disruption(status),
        unschedulable=_unschedulable(status),
        deleting="deletionTimestamp" in meta,
        delete_by=moment(meta.get("deletionTimestamp")),
        forced=_forced(raw),
        node=raw["spec"].get("nodeName"),
        created=moment(meta.get("creationTimestamp")),
        started_at=moment((state.get("running") or ended).get("startedAt")),
        resources=_resources(raw["spec"]),
        claimed_gpus=_claimed_gpus(meta),
        uid=meta.get("uid", ""),
        secrets=_mounted_secrets(raw["spec"]),
    )


def _trainer_state(status: JsonObject) -> JsonObject:
    """The state of the trainer's container; injected sidecars don't count."""
    for container in status.get("containerStatuses") or []:
        if container["name"] == TRAINER_CONTAINER:
            return container.get("state") or {}
    return {}


def _waiting(state: JsonObject) -> Waiting:
    return Waiting(state.get("reason", ""), state.get("message", ""))


def _last_log_line(message: str) -> str:
    """The last line of a log: in a stack trace, the one with the error."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1][:LOG_LINE_LIMIT] if lines else ""


def _out_of_disk(status: JsonObject) -> str | None:
    message = status.get("message") or ""
    return message if status.get("reason") == "Evicted" and OVERGROWN.search(message) else None


def _disruption(status: JsonObject) -> str | None:
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


def _forced(raw: JsonObject) -> bool:
    """Whether a pod was deleted without a grace period, though its node hasn't said that it ended.

    One that no node has is always deleted like that.
    """
    meta = raw["metadata"]
    bound, ended = raw["spec"].get("nodeName"), (raw.get("status") or {}).get("phase") in ENDED
    at_once = "deletionTimestamp" in meta and meta.get("deletionGracePeriodSeconds") == 0
    return bool(bound) and at_once and not ended


def _unschedulable(status: JsonObject) -> str | None:
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition.get("reason") in UNSCHEDULED:
            return str(condition.get("message") or "no node fits")
    return None


def pod_in_brief(raw: JsonObject) -> JsonObject:
    """The part of a pod that is read here: a third of the memory, or less."""
    spec = raw["spec"]
    secrets = [each for each in spec.get("volumes") or [] if "secret" in each]
    kept = {"containers": [_container_in_brief(_trainer(spec))], "volumes": secrets}
    if "nodeName" in spec:
        kept["nodeName"] = spec["nodeName"]
    return {"metadata": metadata_in_brief(raw), "spec": kept, "status": raw.get("status") or {}}


def _container_in_brief(container: JsonObject) -> JsonObject:
    return {key: container[key] for key in ("name", "image", "resources") if key in container}


def metadata_in_brief(raw: JsonObject) -> JsonObject:
    """Metadata without what only other tools read."""
    meta = {key: value for key, value in raw["metadata"].items() if key != "managedFields"}
    if LAST_APPLIED in (meta.get("annotations") or {}):
        notes = {key: text for key, text in meta["annotations"].items() if key != LAST_APPLIED}
        meta["annotations"] = notes
    return meta


def true_conditions(status: JsonObject) -> list[JsonObject]:
    """The conditions of any object's status that are True."""
    return [c for c in status.get("conditions") or [] if c.get("status") == "True"]


def trainer_image(pod_spec: JsonObject) -> str:
    """The image of the trainer's container."""
    return str(_trainer(pod_spec).get("image", ""))


def _trainer(pod_spec: JsonObject) -> JsonObject:
    found = (each for each in pod_spec["containers"] if each["name"] == TRAINER_CONTAINER)
    return next(found, {})


def _resources(pod_spec: JsonObject) -> Mapping[str, int | str]:
    given = _trainer(pod_spec).get("resources") or {}
    return {**(given.get("limits") or {}), **(given.get("requests") or {})}


def _claimed_gpus(meta: JsonObject) -> int:
    told = str((meta.get("annotations") or {}).get(GPUS_ANNOTATION, ""))
    return int(told) if told.isdecimal() else 0


def _mounted_secrets(pod_spec: JsonObject) -> Mapping[str, str]:
    found = {each["name"]: each.get("secret") or {} for each in pod_spec.get("volumes") or []}
    return {
        volume: secret["secretName"]
        for volume, secret in found.items()
        if "secretName" in secret and not secret.get("optional")
    }


def created_at(raw: JsonObject) -> datetime:
    return moment(raw["metadata"].get("creationTimestamp")) or datetime.min.replace(tzinfo=UTC)


def moment(text: str | None) -> datetime | None:
    """Parse a time as Kubernetes writes it."""
    return datetime.fromisoformat(text) if text else None
