"""What is read from objects as Kubernetes writes them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_operator.api.finetunejob import PodSettings, StagesSpec
from finetune_operator.api.observed import FineTuneJobStatus, Phase
from finetune_operator.observe import (
    Finish,
    ObservedJob,
    ReportedProgress,
    job_in_brief,
    observe_finetunejob,
    observe_jobs,
    pods_without_job,
    stages_at_work,
)
from finetune_operator.pods import observe_pod, pod_in_brief
from finetune_trainer.contract import Notice, NoticeCode, Stage
from tests.unit.operator.build import SPEC, finetunejob
from tests.unit.operator.raw import (
    FAILED,
    FINGERPRINT,
    OWNER,
    RESULT,
    RUNS,
    container,
    moment,
    observed,
    observed_pod,
    raw_job,
    raw_pod,
    terminated,
)


def test_a_new_job() -> None:
    assert observed() == ObservedJob(
        name="support-train-0123456789",
        uid="job-uid",
        stage=Stage.TRAIN,
        stage_key=FINGERPRINT,
        attempt=2,
        pod_settings="s1",
        image="trainer:1",
        created=moment("12:00:00"),
    )


@pytest.mark.parametrize("finish", list(Finish))
def test_a_job_that_ended(finish: Finish) -> None:
    condition = {
        "type": str(finish),
        "status": "True",
        "lastTransitionTime": "2026-11-24T12:10:00Z",
    }
    job = observed(conditions=[{"type": "SuccessCriteriaMet", "status": "True"}, condition])
    assert (job.finished, job.finished_at) == (finish, moment("12:10:00"))


@pytest.mark.parametrize(
    ("reason", "failed_by_exit_code"), [("PodFailurePolicy", True), ("BackoffLimitExceeded", False)]
)
def test_why_a_job_failed(reason: str, failed_by_exit_code: bool) -> None:
    assert (
        observed(conditions=[{**FAILED[0], "reason": reason}]).failed_by_exit_code
        is failed_by_exit_code
    )


def test_the_newest_pod_counts() -> None:
    job = observed(raw_pod("late", "12:05:00"), raw_pod("early", "12:01:00"))
    assert job.pod is not None
    assert job.pod.name == "late"


@pytest.mark.parametrize(
    ("early", "at_work"),
    [
        pytest.param(RUNS, True, id="runs"),
        pytest.param({"phase": "Failed", **terminated(14)}, False, id="has ended"),
        pytest.param({"phase": "Failed"}, False, id="failed before it ran"),
        pytest.param({"phase": "Pending", **container(waiting={})}, False, id="never ran"),
    ],
)
def test_an_earlier_pod_lingers_while_it_runs(early: dict[str, Any], at_work: bool) -> None:
    job = observed(raw_pod("late", "12:05:00"), raw_pod("early", "12:01:00", **early))
    assert job.pod is not None
    assert job.pod.name == "late"
    assert [pod.name for pod in job.pods_at_work] == (["early"] if at_work else [])


@pytest.mark.parametrize(
    ("pods", "status", "may_have_pod_at_work"),
    [
        pytest.param([], {}, True, id="a Job that may make a pod"),
        pytest.param([RUNS], {"conditions": FAILED}, True, id="a failed Job whose pod runs"),
        pytest.param(
            [{"phase": "Failed", **terminated(14)}], {"conditions": FAILED}, False, id="all ended"
        ),
        pytest.param([], {"conditions": FAILED}, False, id="a failed Job without a pod"),
    ],
)
def test_what_keeps_the_next_attempt_from_starting(
    pods: list[dict[str, Any]], status: dict[str, Any], may_have_pod_at_work: bool
) -> None:
    assert (
        observed(*(raw_pod(**each) for each in pods), **status).may_have_pod_at_work
        is may_have_pod_at_work
    )


def test_stages_of_pods_that_still_run() -> None:
    pods = [raw_pod("one", **RUNS), raw_pod("two", phase="Failed", **terminated(14)), raw_pod()]
    for pod, stage in zip(pods, ("train", "export", "other"), strict=True):
        pod["metadata"]["labels"] = {"finetune.dev/stage": stage}
    assert {stage: pod.name for stage, pod in stages_at_work(pods).items()} == {Stage.TRAIN: "one"}


@pytest.mark.parametrize(
    ("deleting", "may_work"),
    [pytest.param(False, True, id="may yet start"), pytest.param(True, False, id="never starts")],
)
def test_a_pod_that_has_not_started_may_yet(deleting: bool, may_work: bool) -> None:
    pod = raw_pod(phase="Pending")
    pod["metadata"]["labels"] = {"finetune.dev/stage": "train"}
    if deleting:
        pod["metadata"]["deletionTimestamp"] = "2026-11-24T12:02:00Z"
    assert (Stage.TRAIN in stages_at_work([pod])) is may_work


@pytest.mark.parametrize(
    ("seconds", "node", "phase", "forced"),
    [
        pytest.param(0, "node-1", "Running", True, id="its node never says that it has stopped"),
        pytest.param(120, "node-1", "Running", False, id="it has its grace period"),
        pytest.param(0, None, "Pending", False, id="no node has it"),
        pytest.param(0, "node-1", "Failed", False, id="the node says so, and removes it"),
    ],
)
def test_a_pod_that_somebody_deleted_by_force(
    seconds: int, node: str | None, phase: str, forced: bool
) -> None:
    raw = raw_pod(**{**RUNS, "phase": phase})
    raw["metadata"]["deletionTimestamp"] = "2026-11-24T12:02:00Z"
    raw["metadata"]["deletionGracePeriodSeconds"] = seconds
    raw["spec"]["nodeName"] = node
    pod = observe_pod(raw)
    assert pod.forced is forced
    assert pod.at_work is not (forced or phase == "Failed")


@pytest.mark.parametrize("text", ["tomorrow", "2026-11-24T12:00:02", ""])
def test_what_somebody_wrote_over_the_operators_note_is_passed_over(text: str) -> None:
    raw = raw_job()
    raw["metadata"]["annotations"]["finetune.dev/woken-at"] = text
    (job,) = observe_jobs(finetunejob(), [raw], [])
    assert job.woken is None


def test_a_job_that_its_controller_has_not_taken_up_lacks_no_pod() -> None:
    assert not observed().lacks_pod
    assert observed(startTime="2026-11-24T12:00:02Z").lacks_pod
    assert not observed(raw_pod(), startTime="2026-11-24T12:00:02Z").lacks_pod
    (held,) = observe_jobs(
        finetunejob(), [{**raw_job(), "spec": {**raw_job()["spec"], "suspend": True}}], []
    )
    assert held.suspended
    assert not held.lacks_pod


def test_a_pod_behind_a_gate_has_no_node() -> None:
    words = "Scheduling is blocked due to non-empty scheduling gates"
    gated = {"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}
    assert observed_pod(conditions=[{**gated, "message": words}]).unschedulable == words


def test_a_pod_whose_job_is_gone_is_told_apart() -> None:
    mine, orphan = raw_pod("mine"), raw_pod("orphan")
    orphan["metadata"]["ownerReferences"] = [{"kind": "Job", "uid": "gone", "controller": True}]
    jobs = observe_jobs(finetunejob(), [raw_job()], [mine, orphan])
    assert pods_without_job(jobs, [mine, orphan]) == (orphan,)


def test_pods_and_jobs_of_another_namespace_prove_nothing() -> None:
    """Somebody there wrote our uids, and a result of his own."""
    forged = raw_pod(phase="Succeeded", **terminated(0, RESULT.to_message().decode()))
    forged["metadata"]["namespace"] = "theirs"
    assert observed(forged).pod is None
    job = raw_job()
    job["metadata"]["namespace"] = "theirs"
    assert observe_jobs(finetunejob(), [job], []) == ()


def test_only_a_finetunejob_owns_a_stages_job_and_only_a_job_its_pod() -> None:
    job = raw_job()
    job["metadata"]["ownerReferences"] = [{**OWNER, "kind": "CronJob"}]
    assert observe_jobs(finetunejob(), [job], []) == ()
    pod = raw_pod()
    pod["metadata"]["ownerReferences"][0]["kind"] = "ReplicaSet"
    assert observed(pod).pod is None


def test_jobs_of_others_are_not_looked_at() -> None:
    foreign = raw_job()
    foreign["metadata"]["ownerReferences"] = [{**OWNER, "uid": "uid-2"}]
    unmarked = raw_job()
    unmarked["metadata"]["labels"] = {}
    assert observe_jobs(finetunejob(), [foreign, unmarked], []) == ()


def test_jobs_come_oldest_first() -> None:
    young, old = raw_job(), raw_job()
    old["metadata"] = {
        **old["metadata"],
        "name": "old",
        "creationTimestamp": "2026-11-23T12:00:00Z",
    }
    assert [job.name for job in observe_jobs(finetunejob(), [young, old], [])] == [
        "old",
        "support-train-0123456789",
    ]


@pytest.mark.parametrize(
    ("job", "active"),
    [
        pytest.param(observed(), True, id="no pod yet"),
        pytest.param(observed(raw_pod(phase="Running", **container(running={}))), True, id="runs"),
        pytest.param(observed(raw_pod(**terminated(1))), False, id="the trainer has ended"),
        pytest.param(
            observed(conditions=[{"type": "Failed", "status": "True"}]), False, id="has failed"
        ),
    ],
)
def test_what_may_still_be_at_work(job: ObservedJob, active: bool) -> None:
    assert job.active is active


def raw_finetunejob(spec: Any = None, status: Any = None, **meta: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "support",
            "namespace": "ml",
            "uid": "uid-1",
            "generation": 4,
            "resourceVersion": "99",
            **meta,
        },
        "spec": spec or SPEC,
        "status": status or {},
    }


def test_a_status_that_nobody_has_written_is_of_no_generation() -> None:
    job = observe_finetunejob(raw_finetunejob(SPEC, status={"observedGeneration": -1}))
    assert (job.status, job.not_understood) == (FineTuneJobStatus(), ())


def test_a_new_finetunejob_has_an_empty_status() -> None:
    job = observe_finetunejob(raw_finetunejob())
    assert job.spec is not None
    assert (job.generation, job.resource_version, job.deleting) == (4, "99", False)
    assert job.status == FineTuneJobStatus()


def test_a_spec_that_is_wrong_is_explained_by_field() -> None:
    wrong = json.loads(json.dumps(SPEC))
    wrong["training"] = {"epochs": 0}
    job = observe_finetunejob(raw_finetunejob(wrong))
    assert job.spec is None
    assert job.spec_error is not None
    assert job.spec_error.startswith("spec.training.epochs")
    assert "must be a whole number from 1 to 1000" in job.spec_error


NOTICE = {"code": "LossRising", "step": 40, "evidence": "1.2, then 3.4", "remedy": "Lower it."}


@pytest.mark.parametrize(
    ("progress", "reported"),
    [
        pytest.param(None, ReportedProgress(), id="none"),
        pytest.param({"percent": "10%"}, ReportedProgress(), id="without a word"),
        pytest.param(
            {"job": "train-1", "notices": [NOTICE]},
            ReportedProgress(
                "train-1",
                (
                    Notice(
                        code=NoticeCode.LOSS_RISING,
                        step=40,
                        evidence="1.2, then 3.4",
                        remedy="Lower it.",
                    ),
                ),
            ),
            id="a notice",
        ),
        pytest.param(
            {
                "job": "train-1",
                "notices": [{**NOTICE, "code": "Unheard"}, {"code": "Resumed"}, {"of": "another"}],
            },
            ReportedProgress("train-1", (Notice.model_validate({**NOTICE, "code": "Unheard"}),)),
            id="what a newer trainer says",
        ),
    ],
)
def test_of_progress_the_notices_are_read(progress: Any, reported: ReportedProgress) -> None:
    status = {"progress": progress} if progress else {}
    assert observe_finetunejob(raw_finetunejob(status=status)).reported == reported


def test_progress_is_not_read_since_another_trainer_may_write_it() -> None:
    status = {"phase": "Training", "progress": {"fieldOfTheFuture": 1}}
    assert observe_finetunejob(raw_finetunejob(status=status)).status == FineTuneJobStatus(
        phase=Phase.TRAINING
    )


def test_a_finetunejob_that_is_being_deleted() -> None:
    raw = raw_finetunejob(deletionTimestamp="2026-11-24T12:02:00Z")
    assert observe_finetunejob(raw).deleting


def test_what_the_watches_keep_says_as_much_as_the_whole() -> None:
    whole = raw_pod(
        phase="Failed",
        reason="Evicted",
        message="The node was low on resource: ephemeral-storage.",
        startTime="2026-11-24T12:00:01Z",
        conditions=[{"type": "DisruptionTarget", "status": "True", "reason": "EvictionByKubelet"}],
        containerStatuses=[{"name": "trainer", "state": {"terminated": {"exitCode": 137}}}],
    )
    whole["metadata"] |= {
        "deletionTimestamp": "2026-11-24T12:10:00Z",
        "managedFields": [{"manager": "kubelet"}],
        "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}", "own": "1"},
    }
    trainer = whole["spec"]["containers"][1]
    trainer |= {"resources": {"limits": {"nvidia.com/gpu": 1}}, "env": [{"name": "A"}]}
    secret = {"name": "signing-key", "secret": {"secretName": "key"}}
    whole["spec"] |= {"nodeName": "n1", "volumes": [{"name": "w", "emptyDir": {}}, secret]}
    brief = pod_in_brief(whole)
    assert observe_pod(brief) == observe_pod(whole)
    assert brief["metadata"]["annotations"] == {"own": "1"}
    assert "env" not in str(brief)
    assert "managedFields" not in brief["metadata"]
    job = raw_job(startTime="2026-11-24T12:00:01Z")
    job["spec"] |= {"suspend": True, "activeDeadlineSeconds": 60}
    seen = observe_jobs(finetunejob(), [job_in_brief(job)], [brief])
    assert seen == observe_jobs(finetunejob(), [job], [whole])
    assert (seen[0].suspended, seen[0].deadline_seconds) == (True, 60)


DEFAULTS = {
    "train": {
        "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "64Gi"}},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "env": [{"name": "NCCL_DEBUG", "value": "WARN"}, {"name": "HTTPS_PROXY", "value": "p"}],
        "volumes": [{"claimName": "models", "mountPath": "/models"}],
        "runtimeClassName": "nvidia",
    }
}


def stages_of(**own: Any) -> StagesSpec:
    raw = raw_finetunejob({**SPEC, "stages": own})
    found = observe_finetunejob(raw, DEFAULTS)
    assert found.spec is not None, found.spec_error
    return found.spec.stages


def test_the_operators_settings_stand_beside_the_finetunejobs_own() -> None:
    train = stages_of().train
    assert train == PodSettings.model_validate(DEFAULTS["train"])
    assert stages_of(prepare={"image": "mine:1"}).train == train


def test_what_a_finetunejob_says_itself_counts() -> None:
    train = stages_of(
        train={
            "resources": {"limits": {"nvidia.com/gpu": 4}},
            "env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
            "volumes": [{"claimName": "mine", "mountPath": "/models"}],
            "tolerations": [{"key": "spot", "operator": "Exists"}],
            "runtimeClassName": "other",
        }
    ).train
    assert train.resources.limits == {"nvidia.com/gpu": 4, "memory": "64Gi"}
    assert {each.name: each.value for each in train.env} == {
        "NCCL_DEBUG": "INFO",
        "HTTPS_PROXY": "p",
    }
    assert [each.claim_name for each in train.volumes] == ["mine"]
    assert [each.key for each in train.tolerations] == ["nvidia.com/gpu", "spot"]
    assert train.runtime_class_name == "other"


def test_without_settings_of_the_operator_a_spec_is_as_written() -> None:
    raw = raw_finetunejob({**SPEC, "stages": {"train": {"runtimeClassName": "nvidia"}}})
    assert observe_finetunejob(raw, {}) == observe_finetunejob(raw)


def test_a_workspace_of_its_own_takes_the_place_of_the_operators() -> None:
    defaults = {"train": {"workspace": {"storage": "200Gi", "storageClassName": "fast"}}}
    own = {**SPEC, "stages": {"train": {"workspace": {"sizeLimit": "10Gi"}}}}
    found = observe_finetunejob(raw_finetunejob(own), defaults)
    assert found.spec is not None, found.spec_error
    assert found.spec.stages.train.workspace.size_limit == "10Gi"
