"""The metrics that Prometheus scrapes."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import httpx
import pytest

from finetune_operator.api.observed import (
    FineTuneJobStatus,
    Phase,
    StageState,
    StageUsage,
    UsageStatus,
)
from finetune_operator.monitoring import Metrics, Probes
from tests.unit.operator.build import TRAIN, running, stamp, status
from tests.unit.operator.endings import DONE, LAST


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_a_job_counts_in_one_phase_only() -> None:
    metrics = Metrics()
    metrics.in_phase("ml/a", None)
    metrics.in_phase("ml/a", "Training")
    metrics.in_phase("ml/b", "Training")
    metrics.in_phase("ml/b", "Training")
    assert sample(metrics, "finetune_jobs", namespace="ml", phase="Unknown") == 0
    assert sample(metrics, "finetune_jobs", namespace="ml", phase="Training") == 2


def test_a_job_that_is_gone_is_not_counted() -> None:
    metrics = Metrics()
    metrics.in_phase("ml/a", "Failed")
    metrics.forget("ml/a")
    metrics.forget("ml/a")
    assert sample(metrics, "finetune_jobs", namespace="ml", phase="Failed") == 0


def test_passes_are_counted_by_result() -> None:
    metrics = Metrics()
    metrics.reconciled("changed", 0.1)
    metrics.reconciled("error", 0.2)
    assert sample(metrics, "finetune_reconciles_total", result="changed") == 1
    assert sample(metrics, "finetune_reconcile_duration_seconds_count") == 2
    assert b'finetune_reconciles_total{result="error"} 1.0' in metrics.render()


def test_what_a_status_says_for_the_first_time_is_counted() -> None:
    metrics = Metrics()
    begun = status(Phase.TRAINING, TRAIN, DONE, running(TRAIN, since=-90), LAST)
    metrics.wrote("ml/a", FineTuneJobStatus(), begun)
    metrics.wrote("ml/a", begun, begun)
    where = {"namespace": "ml", "stage": "train"}
    assert sample(metrics, "finetune_stage_attempts_total", **where) == 1
    [prepare, train, export] = begun.stages
    failed = train.model_copy(
        update={
            "state": StageState.PENDING,
            "reason": "OOMKilled",
            "completion_time": stamp(0),
            "disruptions": 2,
        }
    )
    used = UsageStatus(stages=(StageUsage(name=TRAIN, gpu_seconds=180),))
    after = begun.model_copy(update={"stages": (prepare, failed, export), "usage": used})
    metrics.wrote("ml/a", begun, after)
    metrics.wrote("ml/a", after, after)
    assert sample(metrics, "finetune_stage_failures_total", reason="OOMKilled", **where) == 1
    assert sample(metrics, "finetune_stage_disruptions_total", **where) == 2
    assert sample(metrics, "finetune_gpu_seconds_total", **where) == 180
    assert sample(metrics, "finetune_stage_duration_seconds_count", stage="train") is None
    again = running(TRAIN, 2, since=-60)
    second = after.model_copy(update={"stages": (prepare, again, export)})
    done = again.model_copy(update={"state": StageState.SUCCEEDED, "completion_time": stamp(0)})
    metrics.wrote("ml/a", after, second)
    metrics.wrote("ml/a", second, second.model_copy(update={"stages": (prepare, done, export)}))
    assert sample(metrics, "finetune_stage_attempts_total", **where) == 2
    assert sample(metrics, "finetune_stage_duration_seconds_sum", stage="train") == 60


def test_requests_are_counted_by_verb_and_code() -> None:
    metrics = Metrics()
    metrics.requested("PATCH", "409", 0.1)
    assert sample(metrics, "finetune_api_requests_total", verb="PATCH", code="409") == 1
    assert sample(metrics, "finetune_api_request_duration_seconds_count", verb="PATCH") == 1


def test_every_metric_is_in_the_docs() -> None:
    metrics = Metrics()
    metrics.watch_queue(lambda: 0, lambda: 0)
    metrics.watch_events(lambda: 0, lambda: 0)
    page = (Path(__file__).parents[3] / "docs" / "operations.md").read_text(encoding="utf-8")
    names = {each.name for each in metrics.registry.collect() if each.name.startswith("finetune")}
    written = set(re.findall(r"`(finetune_[a-z_]+?)(?:_total)?`", page))
    assert written == names


async def well() -> str:
    return ""


@pytest.mark.parametrize(("dead", "code"), [("", 200), ("the watches don't show changes", 503)])
async def test_liveness_tells_of_a_dead_watch(dead: str, code: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    metrics = Metrics()
    metrics.watches_failed()
    here = f"http://127.0.0.1:{port}"
    async with (
        Probes(port, metrics, well, lambda: dead).serve(),
        httpx.AsyncClient(base_url=here, trust_env=False) as http,
    ):
        answer = await http.get("/healthz")
        scraped = await http.get("/metrics")
    assert (answer.status_code, answer.text) == (code, f"{dead or 'ok'}\n")
    assert "finetune_watch_restarts_total 1.0" in scraped.text
