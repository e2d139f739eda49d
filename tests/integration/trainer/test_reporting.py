"""Trackers write real runs: TensorBoard's files, an MLflow store, an offline run of W&B."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from finetune_trainer.contract import JobReference, Reason, StageError, Tracker
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.train.link import Trained, TrainingWork
from finetune_trainer.train.recipe import sft, training_log
from finetune_trainer.train.supervisor import setup
from tests.integration.trainer.recipe import make_work
from tests.integration.trainer.test_distributed import make_rows

SETTINGS: dict[str, Any] = {"epochs": 1, "loggingSteps": 1, "lora": {"r": 2, "dropout": 0}}
STEPS = 2


def make(model: Path, workdir: Path, *names: str) -> TrainingWork:
    work = make_work(model, workdir, make_rows(12, 1), make_rows(2, 2), reportTo=names, **SETTINGS)
    config = work.config.model_copy(update={"job": JobReference(name="kettle", namespace="ml")})
    return work.model_copy(update={"config": config})


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Variables that a test leaves are put back; nothing of this machine's is read."""
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("TENSORBOARD_LOGGING_DIR", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    yield
    if find_spec("mlflow"):
        import mlflow

        mlflow.set_tracking_uri(None)  # type: ignore[arg-type] # None is its default again


def train(work: TrainingWork) -> Trained:
    setup.check_trackers(work.config.training.report_to, {"WANDB_MODE": "offline"} | _set())
    return sft.fine_tune(work, Reporter())


def _set() -> dict[str, str]:
    import os

    return dict(os.environ)


def test_tensorboard_files_hold_the_losses(tiny_model: Path, tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter  # noqa: F401 - the format's other end

    work = make(tiny_model, tmp_path, "tensorboard")

    trained = train(work)

    (file,) = work.tensorboard.iterdir()
    scalars: dict[str, list[float]] = {}
    for record in records(file.read_bytes()):
        for value in Event.FromString(record).summary.value:
            scalars.setdefault(value.tag, []).append(value.simple_value)
    losses = [entry.loss for entry in trained.history if entry.loss is not None]
    assert len(losses) == STEPS
    assert scalars["train/loss"] == pytest.approx(losses)
    assert len(scalars["eval/loss"]) == 2
    assert "train/learning_rate" in scalars


def records(data: bytes) -> Iterator[bytes]:
    """TFRecord: length (8 bytes), its checksum (4), data, its checksum (4)."""
    while data:
        length = int.from_bytes(data[:8], "little")
        yield data[12 : 12 + length]
        data = data[16 + length :]


def test_mlflow_gets_the_figures_and_the_jobs_name(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    store = (tmp_path / "store").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")

    trained = train(make(tiny_model, tmp_path, "mlflow"))

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name(training_log.PROJECT)
    assert experiment
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "kettle"
    assert run.info.status == "FINISHED"
    losses = [point.value for point in client.get_metric_history(run.info.run_id, "loss")]
    assert losses == pytest.approx([e.loss for e in trained.history if e.loss is not None])
    assert run.data.params["learning_rate"] == "0.0002"


def test_wandb_writes_an_offline_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    work = make(tiny_model, tmp_path, "wandb")

    train(work)

    (file,) = work.workdir.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"kettle" in content
    assert content.count(b"train/loss") >= STEPS


class Refusing(BaseHTTPRequestHandler):
    """A server that answers every request with an error."""

    def do_GET(self) -> None:
        self.send_error(503)

    do_POST = do_GET  # noqa: N815 - http.server's name

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""


def test_a_tracker_that_fails_costs_a_warning_and_not_the_training(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://me:secret-word@127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    try:
        trained = train(make(tiny_model, tmp_path, "mlflow"))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

    assert trained.metrics.train_steps == STEPS
    warnings = [r.getMessage() for r in caplog.records if r.name == training_log.__name__]
    assert len(warnings) == 1
    assert warnings[0].startswith("MLflow fails, the training goes on without it:")
    assert "secret-word" not in caplog.text


@pytest.mark.parametrize(
    ("tracker", "environment", "named"),
    [
        (Tracker.MLFLOW, {}, "MLFLOW_TRACKING_URI"),
        (Tracker.WANDB, {}, "WANDB_API_KEY"),
        (Tracker.WANDB, {"WANDB_MODE": "online"}, "WANDB_API_KEY"),
    ],
)
def test_a_tracker_without_an_address_ends_the_job_before_the_training(
    tracker: Tracker, environment: dict[str, str], named: str, tmp_path: Path
) -> None:
    with pytest.raises(StageError, match=f"training.reportTo names {tracker}.*{named}") as caught:
        setup.check_trackers([tracker], environment, tmp_path)

    assert caught.value.reason is Reason.INVALID_CONFIG


def test_a_tracker_that_is_not_installed_ends_the_job_before_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(setup.TRACKER_PACKAGES, Tracker.WANDB, ("no_such_package",))

    with pytest.raises(StageError, match="no package no_such_package: use an image") as caught:
        setup.check_trackers([Tracker.WANDB], {"WANDB_MODE": "offline"})

    assert caught.value.reason is Reason.INVALID_CONFIG


@pytest.mark.parametrize(
    ("tracker", "environment"),
    [
        (Tracker.TENSORBOARD, {}),
        (Tracker.MLFLOW, {"MLFLOW_TRACKING_URI": "http://mlflow:5000"}),
        (Tracker.WANDB, {"WANDB_API_KEY": "0" * 40}),
        (Tracker.WANDB, {"WANDB_MODE": "offline"}),
    ],
)
def test_a_tracker_with_its_variables_is_accepted(
    tracker: Tracker, environment: dict[str, str], tmp_path: Path
) -> None:
    setup.check_trackers([tracker], environment, tmp_path)


@pytest.mark.parametrize("tracker", list(Tracker))
def test_a_guarded_tracker_gets_every_event_that_it_listens_to(tracker: Tracker) -> None:
    kind: Any = INTEGRATION_TO_CALLBACK[tracker.value]
    events = {name for name in vars(kind) if name.startswith("on_")}
    # The recipe predicts nothing.
    assert events - {"on_predict"} <= vars(training_log.GuardedTracker).keys()
