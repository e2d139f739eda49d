"""CI's files call what there is, and cover each Kubernetes that is supported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from hack.cluster import kind, versions

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yaml"))


def jobs(workflow: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(workflow.read_text())["jobs"]
    return found


@pytest.mark.parametrize("file", [*WORKFLOWS, ROOT / ".ci" / "run"], ids=lambda file: file.name)
def test_every_make_target_that_ci_calls_exists(file: Path) -> None:
    text = re.sub(r"#.*", "", file.read_text())
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = {
        word
        for line in re.findall(r"\bmake ([^\n]+)", text)
        for word in line.split()
        if "=" not in word
    }
    assert called
    assert called <= targets


def test_kind_runs_each_supported_kubernetes() -> None:
    (workflow,) = WORKFLOWS
    job = jobs(workflow)["kind"]
    assert job["strategy"]["matrix"]["kubernetes"] == [f"1.{each}" for each in versions.MINORS]
    assert job["env"] == {"K8S": "${{ matrix.kubernetes }}", "FINETUNE_CLUSTER": "kind"}
    assert [step["run"] for step in job["steps"] if "run" in step][1:] == [
        "make test-operator",
        "make test-e2e",
    ]
    assert sorted(kind.NODE_IMAGES) == list(versions.MINORS)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda file: file.name)
def test_what_a_workflow_leaves_out_is_there(workflow: Path) -> None:
    left_out = re.findall(r"--ignore=(\S+)", workflow.read_text())
    assert left_out
    assert [name for name in left_out if not (ROOT / name).is_file()] == []


def test_ci_runs_the_newest_and_the_oldest() -> None:
    calls = re.findall(r"make (\S+) K8S=(\S+)", (ROOT / ".ci" / "run").read_text())
    assert calls == [("test", "newest"), ("test-operator", "oldest")]
    pins = [versions.OLDEST, versions.NEWEST]
    assert [int(pin.split(".")[1]) for pin in pins] == [versions.MINORS[0], versions.MINORS[-1]]


def test_no_job_may_run_for_ever_or_write() -> None:
    for workflow in WORKFLOWS:
        assert yaml.safe_load(workflow.read_text())["permissions"] == {"contents": "read"}
        assert all("timeout-minutes" in job for job in jobs(workflow).values())
