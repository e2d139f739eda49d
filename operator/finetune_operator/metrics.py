"""Prometheus metrics of the operator, in a registry of their own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# Most passes only look; one that starts a stage makes half a dozen requests.
BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 30.0)
UNKNOWN = "Unknown"


class Metrics:
    """What a person on call asks first: is it working, is it failing, what is waiting."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._phases: dict[str, str] = {}
        self._reconciles = Counter(
            "finetune_reconciles",
            "Passes over a FineTuneJob, by result",
            ["result"],
            registry=self.registry,
        )
        self._duration = Histogram(
            "finetune_reconcile_duration_seconds",
            "Time of one pass",
            buckets=BUCKETS,
            registry=self.registry,
        )
        self._jobs = Gauge(
            "finetune_jobs", "FineTuneJobs, by phase", ["phase"], registry=self.registry
        )

    def reconciled(self, result: str, seconds: float) -> None:
        """Count one pass: `changed`, `unchanged`, `stale`, `gone` or `error`."""
        self._reconciles.labels(result).inc()
        self._duration.observe(seconds)

    def in_phase(self, key: str, phase: str | None) -> None:
        """Remember the phase that a FineTuneJob is in."""
        phase = phase or UNKNOWN
        if self._phases.get(key) != phase:
            self.forget(key)
            self._phases[key] = phase
            self._jobs.labels(phase).inc()

    def forget(self, key: str) -> None:
        """Stop counting a FineTuneJob that is gone."""
        phase = self._phases.pop(key, None)
        if phase is not None:
            self._jobs.labels(phase).dec()

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)
