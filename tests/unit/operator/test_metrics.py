"""The metrics that Prometheus scrapes."""

from __future__ import annotations

from finetune_operator.monitoring import Metrics


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
