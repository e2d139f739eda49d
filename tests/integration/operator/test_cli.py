"""`finetune` against the real API server with the real operator."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from finetune_cli.commands import watch as watching
from finetune_cli.commands.chat import _llama_cpp, _load
from finetune_cli.exits import CliError, ExitCode
from finetune_cli.job import Job
from finetune_cli.main import app
from finetune_cli.version import Version
from finetune_trainer.contract import Reason, Stage, Storage
from finetune_trainer.store import open_folder
from hack.demo.models import base_gguf
from tests.integration.operator.stage import (
    EXPORTED_VERSION,
    SPEC,
    Namespace,
    exported,
    prepared,
    resolved,
    trained,
)
from tests.integration.operator.test_rollback import OLD, ROLLED_BACK, finish_once
from tests.publishing import folder as version_folder
from tests.publishing import publish

MODELFILE = b"FROM ./gguf/smol-Q4_1.gguf\nPARAMETER temperature 0\nPARAMETER num_ctx 256\n"
Run = Callable[..., Result]


@pytest.fixture
def finetune(here: Namespace, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command, in the namespace of the test."""
    monkeypatch.setattr(watching, "SECONDS", 0.1)
    monkeypatch.setenv("KUBECONFIG", str(here.plane.kubeconfig))

    def run(command: str, *args: str, code: ExitCode = ExitCode.OK) -> Result:
        found = CliRunner().invoke(app, [command, *args, "-n", here.name])
        assert found.exit_code == code, (found.output, found.exception)
        return found

    return run


def write_job(folder: Path, **spec: Any) -> str:
    body = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "support"},
        "spec": {**SPEC, **spec},
    }
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(body))
    return str(file)


def test_from_a_file_to_a_finished_job(here: Namespace, finetune: Run, tmp_path: Path) -> None:
    file = write_job(tmp_path)
    assert "too)." in finetune("validate", "-f", file).stdout
    assert "No FineTuneJob" in finetune("list").stderr
    assert "created" in finetune("submit", "-f", file).stdout
    assert "unchanged" in finetune("submit", "-f", file).stdout
    changed = write_job(tmp_path, backoffLimit=3)  # reruns nothing
    assert "changed" in finetune("submit", "-f", changed).stdout
    here.succeed(prepared())
    here.report(here.start_pod(Stage.TRAIN), percent="40%", step=4, totalSteps=10, loss=1.25)
    shown = finetune("watch", "support", "--once").stdout
    assert "40% step 4/10" in shown
    assert "loss 1.25" in shown
    assert "StageStarted: Started train" in shown
    (row,) = finetune("list").stdout.splitlines()[1:]
    assert row.split() == ["support", "Training", "train", "40%", "1.25", row.split()[-1]]
    here.succeed(trained())
    here.succeed(exported())
    told = finetune("watch", "support").stdout
    assert "Succeeded" in told
    assert "gguf/model-F16.gguf" in told
    listed = json.loads(finetune("list", "-o", "json").stdout)
    assert [each["metadata"]["name"] for each in listed["items"]] == ["support"]
    assert finetune("list", "-o", "name").stdout == "finetunejob.finetune.dev/support\n"


def test_a_failed_job_is_told_by_the_exit_code_and_tried_again(
    here: Namespace, finetune: Run
) -> None:
    here.apply()
    here.fail(Stage.PREPARE, Reason.DATASET_EMPTY, "faq.csv has no rows.")
    failed = finetune("watch", "support", code=ExitCode.FAILED)
    assert "faq.csv has no rows." in failed.stderr
    assert "DatasetEmpty" in failed.stdout
    finetune("retry", "support")
    # The request is known to be open although status still says Failed.
    waiting = finetune("watch", "support", "--timeout", "0", code=ExitCode.TIMED_OUT)
    assert "--timeout" in waiting.stderr
    for result in (prepared(), trained(), exported()):
        here.succeed(result)
    finetune("watch", "support", "-o", "json")


def test_suspending_and_resuming(here: Namespace, finetune: Run) -> None:
    here.apply(suspend=True)
    here.wait_phase("Suspended")
    stopped = finetune("watch", "support", code=ExitCode.SUSPENDED)
    assert "finetune resume support" in stopped.stderr
    refused = finetune("retry", "support", code=ExitCode.REFUSED)
    assert "finetune resume support" in refused.stderr
    finetune("resume", "support")
    here.pod(Stage.PREPARE)
    assert "not suspended" in finetune("resume", "support").stdout
    finetune("suspend", "support")
    assert here.spec()["suspend"] is True


def test_going_back_to_the_version_before(here: Namespace, finetune: Run) -> None:
    finish_once(here)
    finetune("rollback", "support", "cccccccccccc", code=ExitCode.NOT_FOUND)
    assert OLD in finetune("rollback", "support").stdout
    here.succeed(ROLLED_BACK)
    here.wait_phase("Succeeded")
    shown = finetune("watch", "support", "--once").stdout
    assert f"{OLD}  Current" in shown
    assert f"{EXPORTED_VERSION}  Available" in shown
    finetune("rollback", "support", "--undo")
    assert "rollbackTo" not in here.spec()


def test_logs_say_what_they_wait_for(here: Namespace, finetune: Run) -> None:
    here.apply()
    pod = here.pod(Stage.PREPARE)["metadata"]["name"]
    assert pod in finetune("logs", "support", code=ExitCode.NOT_FOUND).stderr
    none = finetune("logs", "support", "--stage", "train", code=ExitCode.NOT_FOUND)
    assert "no pod of train" in none.stderr
    finetune("logs", "support", "--stage", "merge", code=ExitCode.USAGE)


def finish_in(here: Namespace, output: Path, name: str, **spec: Any) -> str:
    """Let the job succeed with a version in a folder of this machine; the version's name."""
    model = base_gguf()
    version = version_folder(name).rpartition("/")[2]
    fingerprints = {"train": f"train-{name}", "export": f"export-{name}"}
    here.apply(output={"uri": str(output)}, **spec)
    here.succeed(prepared(found=resolved(**fingerprints)), attempt=1)
    here.succeed(trained().model_copy(update={"metrics": {"evalLoss": 0.5}}))
    files = {
        "gguf/smol-Q4_1.gguf": model.read_bytes(),
        "report.html": b"<html>fine</html>",
        "Modelfile": MODELFILE,
    }
    publish(open_folder(str(output), Storage()), output.with_name("work"), name, files)
    listed = Version.read(
        Job({"metadata": {"name": "support"}, "spec": {"output": {"uri": str(output)}}}), version
    )
    manifest = f"{output}/versions/{version}/manifest.json"
    done = {"artifacts": listed.files, "version": version, "manifest_uri": manifest}
    here.succeed(exported().model_copy(update=done))
    here.wait_phase("Succeeded")
    return version


def test_what_a_job_has_made(
    here: Namespace, finetune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = finish_in(here, tmp_path / "bucket", "a")
    assert "gguf/smol-Q4_1.gguf" in finetune("artifacts", "support").stdout
    assert "bucket" in finetune("watch", "support", "--once").stdout
    folder = tmp_path / "here"
    finetune("artifacts", "support", "--download", str(folder), "--only", "*.html")
    assert sorted(each.name for each in folder.iterdir()) == ["manifest.json", "report.html"]
    listed = tmp_path / "bucket" / "versions" / version / "manifest.json"
    assert (folder / "manifest.json").read_bytes() == listed.read_bytes()
    mine = tmp_path / "mine" / "report.html"
    mine.parent.mkdir()
    mine.write_text("my own")
    again = ("artifacts", "support", "--download", str(mine.parent), "--only", "*.html")
    assert f"{mine} is there already" in finetune(*again, code=ExitCode.USAGE).stderr
    assert mine.read_text() == "my own"
    finetune(*again, "--force")
    assert mine.read_bytes() == b"<html>fine</html>"
    page = tmp_path / "page.html"
    assert str(page) in finetune("report", "support", "--to", str(page)).stdout
    assert page.read_bytes() == b"<html>fine</html>"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = ("--prompt", "What is the capital of France?", "--tokens", "16")
    answered = finetune("chat", "support", *asked)
    assert len(answered.stdout.strip()) > 3
    assert version in answered.stderr
    long = finetune("chat", "support", "--prompt", "word " * 400, code=ExitCode.FAILED)
    assert "error: llama.cpp can't answer: " in long.stderr
    assert "don't differ" in finetune("compare", "support", "support").stdout
    assert "don't differ" in finetune("compare", f"support@{version}", f"support@{version}").stdout
    here.apply(name="other", training={"epochs": 7})
    rows = [row.split() for row in finetune("compare", "support", "other").stdout.splitlines()]
    assert ["training.epochs", "3", "7"] in rows
    assert ["metrics.evalLoss", "0.5", "-"] in rows


def test_doctor_says_what_is_there_and_what_isnt(here: Namespace, finetune: Run) -> None:
    told = finetune("doctor").stdout
    for part in ("+ API server: v1.", "+ FineTuneJob: is installed", "+ operator: operator-"):
        assert part in told
    assert "+ rights: all that is needed" in told
    kubeconfig = here.plane.kubeconfig_for_service_account(here.name, "default")
    poor = finetune("doctor", "--kubeconfig", str(kubeconfig), code=ExitCode.FAILED).stdout
    assert "x rights: you may not get finetunejobs" in poor
    assert "? GPUs: nodes is forbidden" in poor


def test_what_the_api_server_refuses(here: Namespace, finetune: Run, tmp_path: Path) -> None:
    gone = finetune("watch", "nothing", code=ExitCode.NOT_FOUND)
    assert f"namespace {here.name}" in gone.stderr
    # A rule that only the API server can check: a type that Python reads as well.
    finetune("submit", "-f", write_job(tmp_path))
    here.apply(training={"epochs": 7})  # as another tool
    taken = finetune(
        "submit", "-f", write_job(tmp_path, training={"epochs": 2}), code=ExitCode.REFUSED
    )
    assert "--force-conflicts" in taken.stderr
    finetune("submit", "--force-conflicts", "-f", write_job(tmp_path, training={"epochs": 2}))
    assert here.spec()["training"]["epochs"] == 2


def test_a_file_that_is_no_model_is_told_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_text("no model")
    with pytest.raises(CliError, match="can't load"):
        _load(_llama_cpp(), file, 256)
