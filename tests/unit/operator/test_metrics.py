"""The metrics that Prometheus scrapes."""

from __future__ import annotations

import socket

import httpx
import pytest

from finetune_operator.monitoring import Metrics, Probes


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_a_job_counts_in_one_phase_only() -> None:
    metrics = Metrics()
    metrics.in_phase("ml/a", None)
    metrics.in_phase("ml/a", "Training")
    metrics.in_phase("ml/b", "Training")
    metrics.in_phase("ml/b", "Training")
    assert sample(metrics, "finetune_jobs", phase="Unknown") == 0
    assert sample(metrics, "finetune_jobs", phase="Training") == 2


def test_a_job_that_is_gone_is_not_counted() -> None:
    metrics = Metrics()
    metrics.in_phase("ml/a", "Failed")
    metrics.forget("ml/a")
    metrics.forget("ml/a")
    assert sample(metrics, "finetune_jobs", phase="Failed") == 0


def test_passes_are_counted_by_result() -> None:
    metrics = Metrics()
    metrics.reconciled("changed", 0.1)
    metrics.reconciled("error", 0.2)
    assert sample(metrics, "finetune_reconciles_total", result="changed") == 1
    assert sample(metrics, "finetune_reconcile_duration_seconds_count") == 2
    assert b'finetune_reconciles_total{result="error"} 1.0' in metrics.render()


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
