"""The main job on a real node, and what becomes of it: deleted, created anew, edited.

The tests build on each other and run in this order: each takes the cluster as the one before left
it, as a user would.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import yaml
from rich.console import Console

from hack.demo import models
from hack.demo.environment import EXAMPLE, Environment
from hack.demo.follow import follow, poll, ready_message, stage_of
from hack.demo.models import download, models_of, smallest_gguf, version_folder

NAME = yaml.safe_load(EXAMPLE.read_text())["metadata"]["name"]
CHILDREN = "jobs,pods,configmaps,serviceaccounts,roles,rolebindings"
EVERY_NAMESPACE_HAS = {("ConfigMap", "kube-root-ca.crt"), ("ServiceAccount", "default")}
QUIET_SECONDS = 10.0

pytestmark = pytest.mark.timeout(3600)


def children(environment: Environment) -> set[tuple[str, str]]:
    found = {(o["kind"], o["metadata"]["name"]) for o in environment.items(CHILDREN)}
    return {
        (kind, name)
        for kind, name in found - EVERY_NAMESPACE_HAS
        if not name.startswith("default-token-")
    }


def pod_uids(environment: Environment) -> dict[str, str]:
    """The stage of each pod, by the pod's uid."""
    pods = environment.items("pods", "finetune.dev/stage")
    return {p["metadata"]["uid"]: p["metadata"]["labels"]["finetune.dev/stage"] for p in pods}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(environment: Environment, uri: str) -> dict[str, Any]:
    location = urlparse(uri)
    s3 = environment.store.client()
    body = s3.get_object(Bucket=location.netloc, Key=location.path.lstrip("/"))["Body"].read()
    found: dict[str, Any] = json.loads(body)
    return found


def keys(environment: Environment, uri: str) -> dict[str, int]:
    """Sizes of the objects below a URI, by their path below it."""
    location = urlparse(uri)
    prefix = location.path.lstrip("/").rstrip("/") + "/"
    pages = environment.store.client().get_paginator("list_objects_v2")
    listing = pages.paginate(Bucket=location.netloc, Prefix=prefix)
    objects = [o for page in listing for o in page.get("Contents", [])]
    return {o["Key"].removeprefix(prefix): o["Size"] for o in objects}


Finish = Callable[[float], dict[str, Any]]


@pytest.fixture
def finish(environment: Environment, request: pytest.FixtureRequest) -> Finish:
    """Follow the example to its end, shown past pytest's capture: training takes minutes."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def _finish(timeout: float) -> dict[str, Any]:
        with capture.global_and_fixture_disabled():
            return follow(
                environment.reader(NAME), Console(stderr=True, force_terminal=False), timeout
            )

    return _finish


def test_the_example_becomes_models_in_the_bucket(environment: Environment, finish: Finish) -> None:
    environment.kubectl("apply", "-f", str(EXAMPLE))
    job = finish(1800)
    assert job["status"]["phase"] == "Succeeded", ready_message(job)

    status, output = job["status"], job["spec"]["output"]["uri"]
    held = keys(environment, version_folder(job))
    manifest = read_json(environment, status["manifestUri"])
    assert status["manifestUri"] == f"{version_folder(job)}/manifest.json"
    assert read_json(environment, f"{output}/manifest.json") == manifest
    owner = read_json(environment, f"{output}/owner.json")
    assert (owner["namespace"], owner["name"]) == (job["metadata"]["namespace"], NAME)
    assert manifest["files"], "the manifest lists files"
    for artifact in manifest["files"]:
        assert held[artifact["path"]] == artifact["bytes"]
    ggufs = models_of(job)
    assert len(ggufs) == len(job["spec"]["export"]["gguf"])
    for artifact in ggufs:
        assert (
            sha256(download(environment, artifact["uri"], environment.downloads))
            == (artifact["sha256"])
        )
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= held.keys()
    assert "merged/config.json" in held
    rows = status["dataset"]
    assert status["lineage"]["datasetRows"] == rows["examples"] > 0
    assert status["lineage"]["evalRows"] == rows["evalExamples"] > 0
    assert status["progress"]["loss"] > 0
    assert status["metrics"]["evalLoss"] < status["metrics"]["baseEvalLoss"]
    assert status.get("notices", []) == [], "no false alarm on the sample job"


def test_every_gguf_file_was_measured_and_is_within_its_limit(environment: Environment) -> None:
    job = environment.get("finetunejob", NAME)
    for artifact in models_of(job):
        quality = artifact["quality"]
        assert quality["passed"], artifact
        assert 0 <= quality["klDivergence"] <= quality["maxKLDivergence"], artifact
        assert 0.5 < quality["sameTopToken"] <= 1, artifact
        assert quality["perplexity"] < job["status"]["metrics"]["basePerplexity"], artifact


def test_every_condition_is_about_the_current_generation(environment: Environment) -> None:
    job = environment.get("finetunejob", NAME)
    conditions = {c["type"]: c for c in job["status"]["conditions"]}
    assert {name: c["status"] for name, c in conditions.items()} == {
        "Ready": "True",
        "Progressing": "False",
        "Degraded": "False",
    }
    generations = {c["observedGeneration"] for c in conditions.values()}
    assert generations == {job["metadata"]["generation"]}


def test_the_tuned_model_answers_what_only_the_csv_knows(environment: Environment) -> None:
    asked = models.questions()
    job = environment.get("finetunejob", NAME)
    tuned = environment.downloads / Path(smallest_gguf(job)["uri"]).name
    given = dict(zip(asked, models.ask(tuned, asked), strict=True))
    assert [q.text for q, answer in given.items() if not q.answered_by(answer)] == []
    base = dict(zip(asked, models.ask(models.base_gguf(), asked), strict=True))
    assert [q.text for q, answer in base.items() if q.answered_by(answer)] == []


def test_the_three_stages_ran_as_pods_in_order(environment: Environment) -> None:
    pods = environment.items("pods", "finetune.dev/stage")
    started = sorted(pods, key=lambda pod: str(pod["status"]["startTime"]))
    stages = [pod["metadata"]["labels"]["finetune.dev/stage"] for pod in started]
    assert stages == ["prepare", "train", "export"]


def test_no_credential_is_in_a_log_a_status_an_event_or_a_config_map(
    environment: Environment,
) -> None:
    logs = [
        environment.kubectl("logs", pod["metadata"]["name"])
        for pod in environment.items("pods", "finetune.dev/stage")
    ]
    objects = [
        environment.kubectl("get", kind, "-o", "yaml")
        for kind in ("finetunejobs", "jobs", "pods", "configmaps", "events")
    ]
    operator = environment.cluster.kubectl(
        "logs", "-n", "finetune-system", "-l", "app.kubernetes.io/component=operator", "--tail=-1"
    )
    assert all(len(log) > 100 for log in logs), "the logs are there"
    for text in (*logs, *objects, operator):
        assert environment.store.secret_key not in text


def test_applying_the_same_again_starts_nothing(environment: Environment) -> None:
    before = pod_uids(environment)
    version = environment.get("finetunejob", NAME)["metadata"]["resourceVersion"]
    environment.kubectl("apply", "-f", str(EXAMPLE))
    deadline = time.monotonic() + QUIET_SECONDS
    while time.monotonic() < deadline:
        assert pod_uids(environment) == before
        time.sleep(1)
    assert environment.get("finetunejob", NAME)["metadata"]["resourceVersion"] == version


def test_deleting_leaves_nothing(environment: Environment) -> None:
    assert children(environment), "there is something to collect"
    environment.kubectl("delete", "ftj", NAME)
    deadline = time.monotonic() + 90
    while (left := children(environment)) and time.monotonic() < deadline:
        time.sleep(1)
    assert left == set()


def test_created_anew_it_finds_everything_done(environment: Environment, finish: Finish) -> None:
    environment.kubectl("apply", "-f", str(EXAMPLE))
    job = finish(300)
    assert job["status"]["phase"] == "Succeeded", ready_message(job)
    assert sorted(pod_uids(environment).values()) == ["prepare"]
    assert stage_of(job, "train")["cached"]
    assert stage_of(job, "export")["cached"]
    assert models_of(job)
    assert all(artifact["quality"]["passed"] for artifact in models_of(job))


def test_another_quantization_runs_prepare_and_export(
    environment: Environment, finish: Finish
) -> None:
    before = set(pod_uids(environment))
    patch = json.dumps({"spec": {"export": {"gguf": ["Q6_K"], "merged": False}}})
    environment.kubectl("patch", "ftj", NAME, "--type=merge", "-p", patch)
    job = finish(900)
    assert job["status"]["phase"] == "Succeeded", ready_message(job)
    ran = [stage for uid, stage in pod_uids(environment).items() if uid not in before]
    assert sorted(ran) == ["export", "prepare"]
    files = [a["uri"] for a in job["status"]["artifacts"] if a["uri"].endswith("Q6_K.gguf")]
    assert len(files) == 1
    assert any(key.endswith("Q6_K.gguf") for key in keys(environment, version_folder(job)))


def test_a_file_over_its_limit_is_kept_apart_and_the_others_go_out(
    environment: Environment, finish: Finish
) -> None:
    before = set(pod_uids(environment))
    limits = [{"quantization": "Q4_K_M", "maxKLDivergence": 1e-6}]  # which no Q4_K_M can keep
    export = {"gguf": ["Q8_0", "Q4_K_M"], "merged": False, "qualityLimits": limits}
    patch = json.dumps({"spec": {"export": export}})
    environment.kubectl("patch", "ftj", NAME, "--type=merge", "-p", patch)
    job = finish(900)
    assert job["status"]["phase"] == "Failed"
    assert ready_message(job).startswith("QualityGateFailed: ")
    for word in ("Q4_K_M", "1e-06", "spec.export.qualityLimits"):
        assert word in ready_message(job)
    ran = [stage for uid, stage in pod_uids(environment).items() if uid not in before]
    assert sorted(ran) == ["export", "prepare"]
    held = keys(environment, version_folder(job))
    models = [key for key in held if key.endswith(".gguf") and "-LoRA-F32" not in key]
    assert sorted((key.partition("/")[0], key.rpartition("-")[2]) for key in models) == [
        ("gguf", "Q8_0.gguf"),
        ("rejected", "Q4_K_M.gguf"),
    ]
    quality = {a["uri"].rpartition("-")[2]: a.get("quality") for a in job["status"]["artifacts"]}
    assert quality["Q8_0.gguf"]["passed"]
    assert not quality["Q4_K_M.gguf"]["passed"]
    assert quality["Q4_K_M.gguf"]["klDivergence"] > quality["Q4_K_M.gguf"]["maxKLDivergence"]
    events = environment.kubectl("get", "events", "-o", "jsonpath={.items[*].reason}").split()
    assert events.count("QualityGateFailed") == 1


BAD_JOBS = {
    "wrong-column": ({"dataset": {"columns": {"response": "reply"}}}, "ColumnNotFound", "reply"),
    "no-such-file": ({"dataset": {"source": "s3://datasets/gone.csv"}}, "DatasetNotFound", "gone"),
    "refused": ({"storage": {"secretRef": {"name": "wrong-keys"}}}, "StorageAccessDenied", "s3://"),
    "no-model": ({"model": {"source": "s3://models/no-such-model"}}, "ModelNotFound", "no-such"),
}


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in change.items():
        nested = isinstance(value, dict) and isinstance(base.get(key), dict)
        result[key] = merged(base[key], value) if nested else value
    return result


@pytest.fixture(scope="module")
def bad_jobs(environment: Environment) -> dict[str, dict[str, Any]]:
    """All bad jobs at once, each as it is when it has ended."""
    environment.kubectl(
        "create",
        "secret",
        "generic",
        "wrong-keys",
        "--from-literal=AWS_ACCESS_KEY_ID=wrong",
        "--from-literal=AWS_SECRET_ACCESS_KEY=wrong",
        f"--from-literal=AWS_ENDPOINT_URL_S3={environment.store.endpoint}",
    )
    example = yaml.safe_load(EXAMPLE.read_text())
    for name, (change, _, _) in BAD_JOBS.items():
        job = merged(example, {"metadata": {"name": name}, "spec": change})
        job["spec"]["output"]["uri"] += f"-{name}"
        environment.kubectl("apply", "-f", "-", input=json.dumps(job))
    ended = {}
    for name in BAD_JOBS:
        *_, ended[name] = poll(environment.reader(name), 240)
    return ended


@pytest.mark.parametrize("name", BAD_JOBS)
def test_bad_input_fails_before_a_training_job_exists(
    environment: Environment, bad_jobs: dict[str, dict[str, Any]], name: str
) -> None:
    _, reason, word = BAD_JOBS[name]
    job = bad_jobs[name]
    ready = next(c for c in job["status"]["conditions"] if c["type"] == "Ready")
    assert (job["status"]["phase"], ready["reason"]) == ("Failed", reason), ready["message"]
    assert word in ready["message"]
    assert "Traceback" not in ready["message"]
    mine = [
        child["metadata"]["labels"]["finetune.dev/stage"]
        for child in environment.items("jobs", "finetune.dev/stage")
        if child["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
    ]
    assert "train" not in mine


def test_a_secret_that_comes_late_is_waited_for(environment: Environment) -> None:
    secret = json.loads(environment.kubectl("get", "secret", "object-store", "-o", "json"))
    change: dict[str, Any] = {
        "metadata": {"name": "late-secret"},
        "spec": {
            "storage": {"secretRef": {"name": "late"}},
            "dataset": {"columns": {"response": "reply"}},  # so that it ends soon after
        },
    }
    job = merged(yaml.safe_load(EXAMPLE.read_text()), change)
    job["spec"]["output"]["uri"] += "-late-secret"
    environment.kubectl("apply", "-f", "-", input=json.dumps(job))
    read = environment.reader("late-secret")
    deadline = time.monotonic() + 120
    while (degraded := _condition(read(), "Degraded")).get("reason") != "SecretNotFound":
        assert time.monotonic() < deadline, read().get("status")
        time.sleep(0.5)
    assert "late" in degraded["message"]

    secret["metadata"] = {"name": "late"}
    environment.kubectl("create", "-f", "-", input=json.dumps(secret))
    *_, ended = poll(read, 240)
    assert _condition(ended, "Ready")["reason"] == "ColumnNotFound"
    assert stage_of(ended, "prepare")["attempt"] == 1


def _condition(job: dict[str, Any], kind: str) -> dict[str, Any]:
    conditions = job.get("status", {}).get("conditions", [])
    return next((c for c in conditions if c["type"] == kind), {})


def test_a_field_that_does_not_exist_is_refused(environment: Environment) -> None:
    job = yaml.safe_load(EXAMPLE.read_text())
    job["metadata"]["name"] = "typo"
    job["spec"]["training"]["learningrate"] = 1e-3
    with pytest.raises(Exception, match="learningrate"):
        environment.kubectl("apply", "-f", "-", input=json.dumps(job))


def test_a_value_of_the_wrong_type_is_refused(environment: Environment) -> None:
    job = yaml.safe_load(EXAMPLE.read_text())
    job["metadata"]["name"] = "typo"
    job["spec"]["training"]["batchSize"] = "two"
    with pytest.raises(Exception, match=r"spec\.training\.batchSize"):
        environment.kubectl("apply", "-f", "-", input=json.dumps(job))


def test_explain_reads_like_documentation(environment: Environment) -> None:
    text = environment.kubectl("explain", "ftj.spec.training")
    assert "Peak learning rate of AdamW" in text
    assert "gradientAccumulationSteps" in text
