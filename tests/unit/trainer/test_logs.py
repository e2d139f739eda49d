"""The log in both formats, as a process writes it."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from finetune_trainer.contract import Notice, NoticeCode, Progress
from finetune_trainer.contract.base import redact
from finetune_trainer.runtime.lifecycle import JsonLine
from finetune_trainer.runtime.reporter import Reporter

PROGRAM = """
import logging, os, subprocess, sys, warnings
from finetune_trainer.runtime.lifecycle import begin_stage, set_up_libraries

set_up_libraries()
begin_stage("train")
log = logging.getLogger("finetune_trainer.somewhere")
log.info("step %d of the käse", 3, extra={"step": 3, "loss": 1.25})
logging.getLogger("some.library").info("chatter")
try:
    raise ValueError("no")
except ValueError:
    log.exception("It failed with %s", os.environ["AWS_SECRET_ACCESS_KEY"])
if "child" not in sys.argv:
    sys.stdout.flush()
    subprocess.run([sys.executable, "-c", CHILD], check=True)
""".replace(
    "CHILD",
    repr(
        "import logging; from finetune_trainer.runtime.lifecycle import set_up_libraries;"
        "set_up_libraries();"
        "logging.getLogger('finetune_trainer.worker').warning('from the worker')"
    ),
)
SECRET = 'a"secret\\key'


def lines(**environment: str) -> list[str]:
    """What the program writes to standard output and standard error."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "AWS_SECRET_ACCESS_KEY": SECRET, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_json_lines_carry_time_level_logger_stage_figures_and_traceback() -> None:
    step, failure, worker = (json.loads(each) for each in lines(FINETUNE_LOG_FORMAT="json"))

    now = datetime.now(UTC)
    assert now - datetime.fromisoformat(step.pop("time")) < timedelta(minutes=1)
    assert step == {
        "level": "info",
        "logger": "finetune_trainer.somewhere",
        "message": "step 3 of the käse",
        "step": 3,
        "loss": 1.25,
        "stage": "train",
    }
    assert failure["exception"].splitlines()[-1] == "ValueError: no"
    assert failure["message"] == "It failed with ***"
    assert {k: v for k, v in worker.items() if k != "time"} == {
        "level": "warning",
        "logger": "finetune_trainer.worker",
        "message": "from the worker",
        "stage": "train",
    }


def test_a_step_has_its_figures_as_fields() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLine())
    progress = logging.getLogger("finetune_trainer.runtime.reporter")
    progress.addHandler(handler)
    level = progress.level
    progress.setLevel(logging.INFO)
    try:
        Reporter().training_step(
            10, 40, loss=1.5, learning_rate=2e-4, epoch=0.5, tokens_per_second=99.94, eta_seconds=30
        )
        Reporter().evaluation(10, 1.25)
    finally:
        progress.removeHandler(handler)
        progress.setLevel(level)

    step, evaluation = (json.loads(line) for line in stream.getvalue().splitlines())
    figures = {
        "step": 10,
        "total_steps": 40,
        "epoch": 0.5,
        "loss": 1.5,
        "learning_rate": 2e-4,
        "tokens_per_second": 99.9,
        "eta_seconds": 30,
    }
    assert figures.items() <= step.items()
    assert {"step": 10, "eval_loss": 1.25}.items() <= evaluation.items()


def test_no_credential_is_in_the_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recording:
        said: list[Progress] = []

        def publish(self, changes: Progress) -> None:
            self.said.append(changes)

        def close(self) -> None:
            """Nothing to close."""

    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij")
    with Reporter(Recording(), interval=0) as reporter:
        reporter.message("Fetching from https://me:opensesame@store")
        reporter.notice(Notice(code=NoticeCode.RESUMED, evidence="hf_abcdefghij", remedy="-"))
    text = "".join(each.model_dump_json() for each in Recording.said)
    assert "https://***@store" in text
    assert "opensesame" not in text
    assert "hf_abc" not in text


@pytest.mark.parametrize("name", ["human", "", "nonsense"])
def test_lines_for_people_are_the_time_and_the_message(name: str) -> None:
    first, failure, *_, last = lines(FINETUNE_LOG_FORMAT=name)

    assert first[8:] == " step 3 of the käse"
    assert failure[8:] == " It failed with ***"
    assert last[8:] == " from the worker"


@pytest.mark.parametrize(
    ("name", "value", "hidden"),
    [
        ("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE", True),
        ("AWS_SECRET_ACCESS_KEY", "abcdefghij", True),
        ("AWS_SESSION_TOKEN", "abcdefghij", True),
        ("HF_TOKEN", "hf_abcdefghij", True),
        ("WANDB_API_KEY", "0123456789abcdef", True),
        ("MLFLOW_TRACKING_PASSWORD", "opensesame", True),
        ("MLFLOW_TRACKING_PASSWORD", "step", False),  # would black out half of the log
        ("TOKENIZERS_PARALLELISM", "falsefalse", False),
        ("FINETUNE_SIGNING_KEY", "0123456789abcdef", True),
        ("FINETUNE_HUB_TOKEN", "hf_abcdefghij", True),
        ("FINETUNE_MODEL_AWS_SESSION_TOKEN", "abcdefghij", True),
        ("STORE_CREDENTIALS", "abcdefghij", True),
        ("CLIENT_SECRET", "abcdefghij", True),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token", False),
        ("WANDB_PROJECT", "my-project", False),
    ],
)
def test_values_of_credentials_are_blacked_out(
    name: str, value: str, hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)

    assert (value not in redact(f"refused: {value} at step 3")) is hidden


def test_a_user_in_an_url_is_blacked_out() -> None:
    text = redact("MLFLOW_TRACKING_URI=https://me:secret@host:5000/x and http://host:5000/a@b")
    assert redact("https://token@host, s3://a/b@c") == "https://***@host, s3://a/b@c"
    assert redact("https://me:p@ss@host") == "https://***@host"

    assert text == "MLFLOW_TRACKING_URI=https://***@host:5000/x and http://host:5000/a@b"
