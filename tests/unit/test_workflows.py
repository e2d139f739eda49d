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
TEST, RELEASE = (ROOT / ".github" / "workflows" / f"{name}.yaml" for name in ("test", "release"))


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
    job = jobs(TEST)["kind"]
    assert job["strategy"]["matrix"]["kubernetes"] == [f"1.{each}" for each in versions.MINORS]
    assert job["env"] == {"K8S": "${{ matrix.kubernetes }}", "FINETUNE_CLUSTER": "kind"}
    assert [step["run"] for step in job["steps"] if "run" in step][1:] == [
        "make test-operator",
        "make test-e2e",
    ]
    assert sorted(kind.NODE_IMAGES) == list(versions.MINORS)


def test_what_the_tests_workflow_leaves_out_is_there() -> None:
    left_out = re.findall(r"--ignore=(\S+)", TEST.read_text())
    assert left_out
    assert [name for name in left_out if not (ROOT / name).is_file()] == []


def test_ci_runs_the_newest_and_the_oldest() -> None:
    calls = re.findall(r"make (\S+) K8S=(\S+)", (ROOT / ".ci" / "run").read_text())
    assert calls == [("test", "newest"), ("test-operator", "oldest")]
    pins = [versions.OLDEST, versions.NEWEST]
    assert [int(pin.split(".")[1]) for pin in pins] == [versions.MINORS[0], versions.MINORS[-1]]


def test_a_release_is_what_make_release_makes_and_one_job_may_write_it() -> None:
    found = jobs(RELEASE)
    writers = [name for name, job in found.items() if job.get("permissions")]
    assert writers == ["draft"]
    assert found["draft"]["permissions"] == {"contents": "write"}
    text = RELEASE.read_text()
    assert "make release\n" in text
    named = re.findall(r" (charts/\S+)", text)
    assert named
    assert [file for file in named if not (ROOT / file).exists()] == []
    built = {each["image"] for each in found["images"]["strategy"]["matrix"]["include"]}
    assert built == {file.parent.name for file in ROOT.glob("images/*/Dockerfile")}


def test_an_issue_asks_for_what_a_bug_needs() -> None:
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    bug = yaml.safe_load((folder / "bug.yaml").read_text())
    fields = {each["id"]: each for each in bug["body"] if "id" in each}
    needed = [name for name, each in fields.items() if each.get("validations", {}).get("required")]
    assert needed == ["what", "job", "version"]


def test_no_job_may_run_for_ever_or_write() -> None:
    for workflow in WORKFLOWS:
        assert yaml.safe_load(workflow.read_text())["permissions"] == {"contents": "read"}
        assert all("timeout-minutes" in job for job in jobs(workflow).values())
