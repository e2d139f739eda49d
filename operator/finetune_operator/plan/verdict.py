"""Judge one attempt at a stage: still pending, done, or failed, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from finetune_operator.api.observed import Phase, StageStatus
from finetune_operator.observe import Finish, ObservedJob
from finetune_operator.plan.draft import Policy
from finetune_operator.pods import ObservedPod, Waiting
from finetune_operator.status import PendingReason
from finetune_trainer.contract import ExitCode, Reason, Stage, StageResult

JOB_SUSPENDED, QUEUED, PREEMPTED = "JobSuspended", "Queued", "Preempted"  # reasons of Progressing

# How a trainer ends whose pod is deleted: the last two are 128 + SIGKILL and 128 + SIGTERM.
TOLD_TO_STOP = {int(ExitCode.STOPPED), 137, 143}

# The reason behind an exit code, if the container left no StageResult.
REASONS = {
    ExitCode.BAD_INPUT: Reason.DATASET_UNREADABLE,
    ExitCode.BAD_CONFIG: Reason.INVALID_CONFIG,
    ExitCode.GPU_UNAVAILABLE: Reason.GPU_UNAVAILABLE,
    ExitCode.OUT_OF_GPU_MEMORY: Reason.OUT_OF_GPU_MEMORY,
    ExitCode.OUT_OF_MEMORY: Reason.OUT_OF_MEMORY,
    ExitCode.OUT_OF_DISK: Reason.OUT_OF_DISK,
    ExitCode.STOPPED: Reason.STOPPED,
    ExitCode.QUALITY_GATE: Reason.QUALITY_GATE_FAILED,
}

# The kubelet keeps trying to pull an image, but a retry can't help in the last two cases.
PULLING = {"ErrImagePull", "ImagePullBackOff", "RegistryUnavailable", "ImageInspectError"}
UNPULLABLE = {"InvalidImageName", "ErrImageNeverPull"}


@dataclass(frozen=True)
class Pending:
    """Not ended yet."""

    reason: PendingReason | None = None
    requeue_after: float | None = None
    """Seconds after which the verdict may differ even if nothing happens."""

    disruption: Failure | None = None
    """How its pod ended. The Job creates another pod, or fails after this one is gone."""


@dataclass(frozen=True)
class Done:
    """Ended well."""

    result: StageResult | None
    """None if the pod's result was lost, but not its exit code."""

    at: datetime


@dataclass(frozen=True)
class Failure:
    """Failed, or unable to start."""

    reason: Reason
    message: str
    at: datetime
    free: bool = False
    """Whether the attempt doesn't count against backoffLimit."""

    final: bool = False
    """Whether no further attempt is made, whatever the reason."""

    result: StageResult | None = None
    """The stage's own result, if no retry can change it."""


Verdict = Pending | Done | Failure


def judge(job: ObservedJob, stage: StageStatus, policy: Policy, now: datetime) -> Verdict:
    """Judge one attempt by its Job and pod; `stage` holds a disruption seen in an earlier pass."""
    pod = job.pod
    if pod is not None and pod.exit_code == ExitCode.SUCCEEDED:
        return _succeeded(job.stage, pod, now)
    if leaving := _leaving(job, policy, now):
        return leaving
    if pod is None:
        return _without_pod(job, stage, policy, now)
    if pod.exit_code is not None or pod.phase == "Failed" or pod.forced:
        return _ended(job, pod, policy, now)
    if job.finished is not None:
        return _without_pod_report(job, policy, now)
    return _not_started(job.stage, pod, policy, now)


def _leaving(job: ObservedJob, policy: Policy, now: datetime) -> Pending | None:
    """Wait for a pod that is on its way out, if there is one to wait for."""
    pod = job.pod
    if pod is not None and (overdue := lost_node(job.stage, pod, policy, now)):
        return Pending(PendingReason(overdue.reason, overdue.message, degraded=True))
    if job.deleting:
        return Pending()  # until it is gone
    if pod is None or pod.has_ended or pod.delete_by is None or job.finished is not None:
        return None
    words = f"The pod {pod.name} of {job.stage} is being deleted."
    return Pending(PendingReason("Stopping", words), until_lost(pod, policy, now))


def _succeeded(stage: Stage, pod: ObservedPod, now: datetime) -> Verdict:
    result = pod.result if pod.result is not None and pod.result.stage is stage else None
    at = pod.finished_at or now
    if result is not None and result.reason is not Reason.SUCCEEDED:
        return Failure(result.reason, result.message, at)
    if stage is Stage.PREPARE and (result is None or result.resolved is None):
        return Failure(Reason.INTERNAL_ERROR, "prepare ended without saying what it found.", at)
    return Done(result, at)


def _ended(job: ObservedJob, pod: ObservedPod, policy: Policy, now: datetime) -> Verdict:
    failure = _failure(job.stage, pod, pod.finished_at or now)
    if not failure.free or job.finished is not None:
        return failure
    if pod.forced:
        return failure  # the Job waits for ever for a node to say how it ended
    # The Job creates another pod within the same attempt after a disruption that its
    # podFailurePolicy ignores. After a deletion it fails, but only when the pod is gone. So wait
    # for the Job, unless a sidecar keeps the pod, and so the Job, from ending at all.
    if job.outlives_trainer and not pod.deleting:
        left = policy.sidecar_grace - (now - failure.at)
        if left <= timedelta():
            return failure
        delay = min(left, policy.sidecar_grace).total_seconds()
        return Pending(disruption=failure, requeue_after=delay)
    if job.suspended and job.queue is not None:
        return _held_back(job, policy, now)  # its pod had to go, which is no failure
    held = _held_back(job, policy, now) if job.suspended else Pending()
    return replace(held, disruption=failure)


def _failure(stage: Stage, pod: ObservedPod, at: datetime) -> Failure:
    result = pod.result
    if result is not None and result.reason is Reason.SUCCEEDED:
        result = None  # the exit code contradicts it
    elif result is not None and result.reason is Reason.INTERNAL_ERROR:
        # A reason that only a newer trainer knows is read as this one, but has its own exit code.
        reason = _reason_of(pod.exit_code) or result.reason
        result = result.model_copy(update={"reason": reason})
    if result is not None and not result.reason.retryable:
        # True whether or not the pod was disrupted as well.
        return Failure(result.reason, result.message, at, result=result)
    outside = _from_outside(stage, pod, at)
    if outside is not None and result is not None:
        return replace(outside, message=f"{outside.message} {result.message}")
    if outside is not None:
        return outside
    if result is not None:
        return Failure(result.reason, result.message, at, free=result.reason is Reason.STOPPED)
    return _without_result(stage, pod, at)


def _from_outside(stage: Stage, pod: ObservedPod, at: datetime) -> Failure | None:
    """A cause that only the node or the control plane knows."""
    if pod.out_of_disk is not None:
        return Failure(Reason.OUT_OF_DISK, _out_of_disk(stage, pod.out_of_disk), at)
    if pod.disruption is not None:
        return _disrupted(stage, pod.disruption, at)
    if pod.oom_killed:
        return Failure(Reason.OOM_KILLED, _oom_killed(stage), at)
    if pod.forced:
        return _disrupted(stage, f"the pod {pod.name} was deleted by force", at)
    if pod.deleting and (pod.exit_code is None or pod.exit_code in TOLD_TO_STOP):
        return _disrupted(stage, "the pod was deleted", at)
    return None


def _without_result(stage: Stage, pod: ObservedPod, at: datetime) -> Failure:
    """Judge a container that ended without a StageResult by its exit code."""
    code = pod.exit_code
    if code is None:
        return Failure(Reason.INTERNAL_ERROR, f"The pod of {stage} failed before it ran.", at)
    words = f": {pod.last_log_line}" if pod.last_log_line else "; its log may say why."
    reason = _reason_of(code) or Reason.INTERNAL_ERROR
    message = f"{stage} ended with exit code {code}{words}"
    return Failure(reason, message, at, free=reason is Reason.STOPPED)


def _reason_of(code: int | None) -> Reason | None:
    """The reason that an exit code stands for, if it stands for one."""
    return REASONS.get(ExitCode(code)) if code in {int(each) for each in ExitCode} else None


def _disrupted(stage: Stage, why: str, at: datetime) -> Failure:
    message = f"The pod of {stage} was disrupted ({why})."
    return Failure(Reason.POD_DISRUPTED, message, at, free=True)


def _oom_killed(stage: Stage) -> str:
    return (
        f"{stage} was killed because it used more memory than it may. "
        f"Raise spec.stages.{stage}.resources.limits.memory."
    )


def _out_of_disk(stage: Stage, words: str) -> str:
    return (
        f"{stage} used more disk than it may ({words.rstrip('. ')}). "
        f"Raise spec.stages.{stage}.resources.limits.ephemeral-storage, or workspace.sizeLimit "
        "where it is set."
    )


def _stopping(stage: Stage, pod: ObservedPod) -> str:
    return (
        f"The Job of {stage} has failed, and its pod {pod.name} is stopping. Should the pod's node "
        f"be lost, delete the pod by force."
    )


def _without_pod(job: ObservedJob, stage: StageStatus, policy: Policy, now: datetime) -> Verdict:
    if job.finished is Finish.FAILED and stage.reason in set(Reason):
        message, at = stage.message or "", job.finished_at or now
        return Failure(Reason(stage.reason), message, at, free=True)
    if job.finished is not None:
        return _without_pod_report(job, policy, now)
    if job.suspended:
        return _held_back(job, policy, now)
    if job.taken_up is None:
        return _not_taken_up(job, policy, now)
    return _pod_not_created(job, job.taken_up, stage, policy, now)


def _not_taken_up(job: ObservedJob, policy: Policy, now: datetime) -> Pending:
    """The Job controller works through its queue, or doesn't work at all."""
    waited = now - job.created
    for grace in (policy.pod_grace, policy.queue_grace):
        if waited < grace:
            delay = (grace - waited).total_seconds()
            quiet = grace is policy.pod_grace
            words = f"The Job {job.name} is in the queue of the Job controller."
            return Pending(
                None if quiet else PendingReason(QUEUED, words, phase=Phase.QUEUED), delay
            )
    minutes = policy.queue_grace.total_seconds() / 60
    words = (
        f"The Job controller has not taken up the Job {job.name} within {minutes:.0f} minutes. See "
        f"whether kube-controller-manager is at work."
    )
    return Pending(PendingReason("PodNotCreated", words, degraded=True))


def _pod_not_created(
    job: ObservedJob, since: datetime, stage: StageStatus, policy: Policy, now: datetime
) -> Pending:
    left = policy.pod_grace - (now - since)
    if left > timedelta():
        return Pending(requeue_after=left.total_seconds())
    again = policy.pod_grace.total_seconds()  # its words may be others by then
    if job.refusal is not None:
        words = f"No pod can be created for the Job {job.name}: {job.refusal}"
        return Pending(PendingReason("PodNotCreated", words, degraded=True), again)
    if stage.lost_pod is not None:
        words = f"The Job {job.name} makes another pod of {job.stage}."
        return Pending(PendingReason(QUEUED, words, phase=Phase.QUEUED), again)
    words = f"The Job {job.name} has no pod yet. `kubectl describe job {job.name}` may say why."
    return Pending(PendingReason("PodNotCreated", words, degraded=True), again)


def _without_pod_report(job: ObservedJob, policy: Policy, now: datetime) -> Verdict:
    """The Job has ended, but the pod's result isn't visible: not yet, or no longer."""
    if job.finished is Finish.FAILED and job.pod is not None and job.pod.at_work:
        # The pod may use its grace period to stop.
        return Pending(PendingReason("Stopping", _stopping(job.stage, job.pod)))
    at = job.finished_at or now
    left = policy.report_grace - (now - at)
    if left > timedelta():
        return Pending(requeue_after=left.total_seconds())
    if job.finished is Finish.COMPLETE and job.stage is not Stage.PREPARE:
        return Done(None, at)
    message = f"The Job {job.name} ended, and its pod is gone with what it had to say."
    if job.finished is Finish.COMPLETE:
        return Failure(Reason.INTERNAL_ERROR, message, at)
    # A pod that fails by itself stays, so its failure is seen and counted. If the pod is gone and
    # its end was never seen, somebody took it away.
    free = job.pod is None and not job.failed_by_exit_code
    return Failure(Reason.POD_DISRUPTED, message, at, free=free)


def lost_pods(job: ObservedJob, policy: Policy, now: datetime) -> list[tuple[str, Failure]]:
    """The pods that the attempt lost without its doing, by name, oldest first."""
    found: list[tuple[str, Failure]] = []
    for pod in (*job.earlier_pods, *((job.pod,) if job.pod is not None else ())):
        failure = lost_node(job.stage, pod, policy, now)
        if pod.has_ended and pod.exit_code != ExitCode.SUCCEEDED:
            failure = _failure(job.stage, pod, pod.finished_at or now)
        if failure is not None and failure.free:
            found.append((pod.name, failure))
    return found


def made_room(job: ObservedJob, failure: Failure) -> bool:
    """Whether a pod ended because Kueue suspended its Job, for another one: then it is no loss.

    The Job controller dates the start of a Job anew whenever it goes on.
    """
    if job.queue is None or failure.reason is Reason.NODE_LOST:
        return False
    return job.suspended or (job.taken_up is not None and failure.at < job.taken_up)


def until_lost(pod: ObservedPod, policy: Policy, now: datetime) -> float | None:
    """Seconds until a pod that is being deleted should have stopped, all clocks allowed for."""
    if pod.has_ended or pod.delete_by is None:
        return None
    return max((pod.delete_by + policy.clock_skew - now).total_seconds(), 0) + 1


def lost_node(stage: Stage, pod: ObservedPod, policy: Policy, now: datetime) -> Failure | None:
    """What to say of a pod that should have stopped long ago: only its node could tell."""
    if pod.has_ended or pod.delete_by is None or now <= pod.delete_by + policy.clock_skew:
        return None
    message = (
        f"The pod {pod.name} of {stage} should have stopped by now, and its node "
        f"{pod.node or 'is unknown'} doesn't say that it has. When you know that the node is off: "
        f"kubectl delete pod {pod.name} --force --grace-period=0. Two pods would write the same "
        f"files."
    )
    return Failure(Reason.NODE_LOST, message, now, free=True)


def _not_started(stage: Stage, pod: ObservedPod, policy: Policy, now: datetime) -> Verdict:
    if pod.started:
        return Pending()
    if pod.waiting is None:
        return Pending(_unscheduled(stage, pod))
    return _waiting(stage, pod, pod.waiting, policy, now)


def _waiting(
    stage: Stage, pod: ObservedPod, waiting: Waiting, policy: Policy, now: datetime
) -> Verdict:
    if pod.mounts_secrets:
        return _mounting(stage, pod, policy, now)
    if waiting.reason in UNPULLABLE:
        return Failure(Reason.IMAGE_NOT_PULLED, _not_pulled(stage, pod, waiting), now)
    if waiting.reason in PULLING:
        message = _not_pulled(stage, pod, waiting)
        return Pending(PendingReason(Reason.IMAGE_NOT_PULLED, message, degraded=True))
    if pod.missing_secret is not None:
        return _secret_missing(stage, pod, policy, now)
    if waiting.reason.endswith("Error"):
        message = f"The pod of {stage} can't start ({waiting.reason}): {waiting.message}"
        return Pending(PendingReason(waiting.reason, message, degraded=True))
    return Pending()


def _mounting(stage: Stage, pod: ObservedPod, policy: Policy, now: datetime) -> Pending:
    """Nothing tells when the kubelet's words change, so they are asked for again and again."""
    again = policy.secret_grace.total_seconds()
    if pod.missing_secret is not None:
        return replace(_secret_missing(stage, pod, policy, now), requeue_after=again)
    if pod.mount_failure is None:
        return Pending(requeue_after=again)
    message = f"The pod of {stage} can't start (FailedMount): {pod.mount_failure}"
    return Pending(PendingReason("FailedMount", message, degraded=True), requeue_after=again)


def _unscheduled(stage: Stage, pod: ObservedPod) -> PendingReason | None:
    if pod.unschedulable is None:
        return None
    message = f"The pod of {stage} waits for a node: {pod.unschedulable}"
    return PendingReason(Reason.UNSCHEDULABLE, message, phase=Phase.QUEUED)


def _held_back(job: ObservedJob, policy: Policy, now: datetime) -> Pending:
    if job.queue is None:
        words = f"The Job {job.name} is suspended: it waits for its turn in a queue, if it has one."
        return Pending(PendingReason(JOB_SUSPENDED, words, phase=Phase.QUEUED))
    words = f"{job.stage} waits in Kueue's queue {job.queue}"
    state = job.queue_state
    if state is None:
        # Kueue hasn't looked at it yet, or has just let it go on, or may not be asked. Each time
        # the Job waits as long again as it has, within limits.
        waited = max(now - job.created, policy.queue_first_look)
        again = min(waited, policy.queue_look).total_seconds()
        return Pending(PendingReason(QUEUED, f"{words}.", phase=Phase.QUEUED), again)
    again = policy.queue_look.total_seconds()  # nothing tells when Kueue says something else
    words = f"{words}: {state.message}"
    if not state.admissible:
        remedy = "Have the queue set up, or set spec.queueName to another one."
        words = f"{words.rstrip('.')}. {remedy}"
        return Pending(
            PendingReason("Inadmissible", words, degraded=True, phase=Phase.QUEUED), again
        )
    reason = PREEMPTED if state.preempted else QUEUED
    return Pending(PendingReason(reason, words, phase=Phase.QUEUED), again)


def _not_pulled(stage: Stage, pod: ObservedPod, waiting: Waiting) -> str:
    words = f": {waiting.message}" if waiting.message else ""
    return (
        f"The image {pod.image} of {stage} can't be pulled ({waiting.reason}{words}). "
        f"Check its name (spec.stages.{stage}.image, or the operator's setting) and the registry."
    )


def _secret_missing(stage: Stage, pod: ObservedPod, policy: Policy, now: datetime) -> Pending:
    """The kubelet goes on trying, so the stage starts as soon as the Secret is there."""
    message = (
        f"{pod.missing_secret}, and the pod of {stage} needs it. Create it; the pod then starts by "
        "itself."
    )
    left = policy.secret_grace - (now - pod.since)
    late = left <= timedelta()
    reason = PendingReason(Reason.SECRET_NOT_FOUND, message, degraded=late)
    return Pending(reason, requeue_after=None if late else left.total_seconds())
