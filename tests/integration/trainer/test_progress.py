"""Live progress on a real API server, with a token that may patch one status and nothing else."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
import yaml

from finetune_trainer.contract import JobReference, Notice, NoticeCode, Stage
from finetune_trainer.runtime.reporter import NOTICE_LIMIT, ApiServer, Reporter, reporter_for
from hack import REPOSITORY
from hack.cluster.control_plane import ControlPlane

NAME = "reports"
OBJECTS = f"""
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {{name: {NAME}}}
spec:
  model: {{source: org/name}}
  dataset: {{source: s3://data/train.csv}}
  output: {{uri: s3://models/run}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: {NAME}}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {{name: {NAME}}}
rules:
- apiGroups: [finetune.dev]
  resources: [finetunejobs/status]
  resourceNames: [{NAME}]
  verbs: [patch]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {{name: {NAME}}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: Role, name: {NAME}}}
subjects: [{{kind: ServiceAccount, name: {NAME}}}]
"""


class Pod:
    """What a pod of the job sees of the cluster."""

    def __init__(self, plane: ControlPlane, namespace: str, account: Path) -> None:
        self.plane = plane
        self.job = JobReference(name=NAME, namespace=namespace)
        self.account = account
        self.kubectl("apply", "-f", "-", input=OBJECTS)
        kubeconfig = yaml.safe_load(
            plane.kubeconfig_for_service_account(namespace, NAME).read_text()
        )
        (account / "token").write_text(kubeconfig["users"][0]["user"]["token"])
        (account / "ca.crt").write_bytes(plane.ca.read_bytes())

    def kubectl(self, *args: str, input: str | None = None) -> str:  # noqa: A002 - as subprocess
        return self.plane.kubectl("--namespace", self.job.namespace, *args, input=input)

    def progress(self) -> dict[str, Any]:
        job = json.loads(self.kubectl("get", "finetunejob", NAME, "-o", "json"))
        progress: dict[str, Any] = job.get("status", {}).get("progress", {})
        return progress

    def api(self) -> ApiServer:
        address = urlsplit(self.plane.server)
        return ApiServer(self.job, str(address.hostname), str(address.port), self.account)


@pytest.fixture
def pod(control_plane: ControlPlane, tmp_path: Path) -> Pod:
    control_plane.apply_definitions(str(REPOSITORY / "crds"))
    namespace = f"progress-{uuid4().hex[:8]}"
    control_plane.kubectl("create", "namespace", namespace)
    return Pod(control_plane, namespace, tmp_path)


def report_training(reporter: Reporter) -> None:
    reporter.begin(Stage.TRAIN, "Training")
    reporter.steps(20, 57, eta_seconds=250)
    reporter.training_step(
        20,
        57,
        loss=1.23456,
        learning_rate=2e-4,
        epoch=1.0567,
        tokens_per_second=412.34,
        eta_seconds=250,
    )


def test_the_status_shows_where_the_training_is(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    address = urlsplit(pod.plane.server)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", str(address.hostname))
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(address.port))
    with reporter_for(pod.job, pod.account) as reporter:
        report_training(reporter)
    progress = pod.progress()
    assert progress.pop("lastUpdateTime").endswith("Z")
    assert progress == {
        "stage": "train",
        "step": 20,
        "totalSteps": 57,
        "percent": "35%",
        "epoch": 1.06,
        "loss": 1.2346,
        "learningRate": 2e-4,
        "tokensPerSecond": 412.3,
        "eta": "4m10s",
        "message": "Training",
        "heartbeatSeconds": 60,
    }

    with Reporter(pod.api()) as reporter:
        reporter.begin(Stage.EXPORT, "Merging")
    progress = pod.progress()
    assert progress.pop("lastUpdateTime").endswith("Z")
    assert progress == {"stage": "export", "message": "Merging", "loss": 1.2346}


RISING = Notice(
    code=NoticeCode.LOSS_RISING,
    step=40,
    evidence="loss 1.2 at step 20, 3.4 at step 40",
    remedy="Lower spec.training.learningRate.",
)
RESUMED = Notice(code=NoticeCode.RESUMED, evidence="checkpoint of step 30.", remedy="None needed.")


def test_the_status_shows_what_the_training_noticed_and_how_it_was_evaluated(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_JOB", "support-train-1")
    with Reporter(pod.api(), interval=0.05) as reporter:
        reporter.begin(Stage.TRAIN, "Training")
        reporter.evaluation(0, 2.5)
        reporter.notice(RESUMED)
        _wait_for(pod, "evalLoss")  # what was sent before is not lost from the list
        reporter.notice(RISING)
        reporter.evaluation(40, 1.23456)
    progress = pod.progress()
    assert progress["job"] == "support-train-1"
    assert progress["evalLoss"] == 1.2346
    assert progress["notices"] == [
        {"code": "Resumed", "evidence": "checkpoint of step 30.", "remedy": "None needed."},
        {
            "code": "LossRising",
            "step": 40,
            "evidence": "loss 1.2 at step 20, 3.4 at step 40",
            "remedy": "Lower spec.training.learningRate.",
        },
    ]

    with Reporter(pod.api()) as reporter:
        reporter.begin(Stage.EXPORT, "Merging")
    assert pod.progress()["notices"] == progress["notices"]
    with Reporter(pod.api()) as reporter:
        reporter.begin(Stage.TRAIN, "Training anew")
    assert not {"notices", "evalLoss"} & pod.progress().keys()


def test_the_status_keeps_the_last_notices_only(pod: Pod) -> None:
    with Reporter(pod.api()) as reporter:
        reporter.begin(Stage.TRAIN, "Training")
        for step in range(50):
            reporter.notice(RISING.model_copy(update={"step": step}))
    steps = [notice["step"] for notice in pod.progress()["notices"]]
    assert steps == list(range(50 - NOTICE_LIMIT, 50))


def test_a_loss_that_is_no_number_leaves_the_rest_of_the_report_alone(pod: Pod) -> None:
    with Reporter(pod.api()) as reporter:
        report_training(reporter)
        reporter.training_step(
            21,
            57,
            loss=math.nan,
            learning_rate=1.0,
            epoch=1.1,
            tokens_per_second=400.0,
            eta_seconds=240,
        )
        reporter.evaluation(21, math.inf)
        reporter.message("The loss is no number")
    progress = pod.progress()
    assert progress["message"] == "The loss is no number"
    assert progress["learningRate"] == 1.0
    assert not {"loss", "evalLoss"} & progress.keys()


def _wait_for(pod: Pod, field: str) -> None:
    deadline = time.monotonic() + 10
    while field not in pod.progress():
        assert time.monotonic() < deadline, f"{field} was not reported"


def test_a_renewed_token_is_used(pod: Pod) -> None:
    good = (pod.account / "token").read_text()
    (pod.account / "token").write_text("expired")
    with Reporter(pod.api(), interval=0.05) as reporter:
        reporter.begin(Stage.TRAIN, "Training")
        time.sleep(0.3)
        assert pod.progress() == {}
        (pod.account / "token").write_text(good)
        reporter.steps(1, 10)
    assert pod.progress()["message"] == "Training"
    assert pod.progress()["step"] == 1


def test_no_api_server_is_one_warning_and_costs_no_time(
    tmp_path: Path, control_plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "token").write_text("token")
    (tmp_path / "ca.crt").write_bytes(control_plane.ca.read_bytes())
    job = JobReference(name=NAME, namespace="nowhere")
    began = time.monotonic()
    with (
        caplog.at_level(logging.WARNING),
        Reporter(ApiServer(job, "127.0.0.1", "9", tmp_path), interval=0.01) as reporter,
    ):
        for step in range(1000):
            reporter.steps(step, 1000)
        assert time.monotonic() - began < 1
        time.sleep(0.3)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "Progress can't be reported, the work goes on"
    ]


def test_outside_a_cluster_only_the_log_is_written(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with caplog.at_level(logging.INFO), reporter_for(None) as reporter:
        report_training(reporter)
    assert "step 20/57  epoch 1.06  loss 1.2346  learning rate 2.00e-04" in caplog.text


def test_notices_and_evaluations_are_lines_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Reporter() as reporter:
        reporter.notice(RISING)
        reporter.notice(RESUMED)
        reporter.evaluation(40, 1.2345)
        reporter.evaluation(41, 1000.0)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "WARNING",
            "LossRising: step 40: loss 1.2 at step 20, 3.4 at step 40. "
            "Lower spec.training.learningRate.",
        ),
        ("INFO", "Resumed: checkpoint of step 30. None needed."),
        ("INFO", "evaluation: step 40 loss 1.2345 perplexity 3.44"),
        ("INFO", "evaluation: step 41 loss 1000.0000 perplexity inf"),
    ]
