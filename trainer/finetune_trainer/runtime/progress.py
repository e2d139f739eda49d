"""How far the work is: a line in the log, and `status.progress` of the FineTuneJob.

The patch to the API server is sent by a thread of its own, at most every ten seconds, so that the
work never waits for it. When it fails, one warning is logged and the work goes on.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from finetune_trainer.contract import JobReference, Notice, Stage, status_path
from finetune_trainer.runtime.units import duration, perplexity, size

if TYPE_CHECKING:
    import httpx

INTERVAL_SECONDS = 10.0
REQUEST_SECONDS = 5.0
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
# Set by the operator: the Job of this pod, by which it knows whose notices it reads.
JOB_VARIABLE = "FINETUNE_JOB"
NOTICE_LIMIT = 20  # the last so many stand in status.progress; all are in the log

log = logging.getLogger(__name__)


class Publisher(Protocol):
    """Brings a merge patch of `status.progress` to where people look."""

    def publish(self, progress: dict[str, Any]) -> None:
        """Send; raises OSError or ValueError when it fails."""

    def close(self) -> None:
        """Release connections."""


class Reporter:
    """Collects what the stages report; fields that are None are cleared."""

    def __init__(self, publisher: Publisher | None = None, interval: float = INTERVAL_SECONDS):
        self._publisher = publisher
        self._interval = interval
        self._fields: dict[str, Any] = {}
        self._notices: list[Notice] = []
        self._dirty = threading.Event()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._failed = False
        self._thread = threading.Thread(target=self._send_loop, name="progress", daemon=True)
        if publisher:
            self._thread.start()

    def begin(self, stage: Stage, message: str) -> None:
        """A stage begins: clear what no longer applies.

        What the training said last (loss, notices) stays, except for `train`.
        """
        cleared = [
            "step",
            "totalSteps",
            "percent",
            "epoch",
            "learningRate",
            "tokensPerSecond",
            "eta",
        ]
        if stage is Stage.TRAIN:
            cleared += ["loss", "evalLoss", "notices"]
            self._notices = []
        log.info("%s", message)
        begun = {"stage": stage.value, "job": os.environ.get(JOB_VARIABLE), "message": message}
        # In one piece, lest the new stage be seen with the message of the one before.
        self._update({**dict.fromkeys(cleared), **begun})

    def done(self, message: str) -> None:
        """The stage is done; the log gets its own last line."""
        self._update({"percent": "100%", "eta": None, "message": message})

    def message(self, text: str) -> None:
        """Say what is being done, in the log and in the status."""
        log.info("%s", text)
        self._update({"message": text})

    def steps(self, step: int, total: int, *, eta_seconds: float | None = None) -> None:
        """Say how many of the steps are done."""
        self._update(
            {
                "step": step,
                "totalSteps": total,
                "percent": f"{100 * step // max(total, 1)}%",
                "eta": None if eta_seconds is None else duration(eta_seconds),
            }
        )

    def training_step(
        self,
        step: int,
        total: int,
        *,
        loss: float,
        learning_rate: float,
        epoch: float,
        tokens_per_second: float,
        eta_seconds: float,
    ) -> None:
        """The figures of a logging step: a line in the log, and into the status."""
        log.info(
            "step %d/%d  epoch %.2f  loss %.4f  learning rate %.2e  %.0f tokens/s  %s left",
            step,
            total,
            epoch,
            loss,
            learning_rate,
            tokens_per_second,
            duration(eta_seconds),
            extra={
                "step": step,
                "total_steps": total,
                "epoch": round(epoch, 4),
                "loss": _figure(loss, 6),
                "learning_rate": learning_rate,
                "tokens_per_second": _figure(tokens_per_second, 1),
                "eta_seconds": round(eta_seconds),
            },
        )
        self._update(
            {
                "loss": _figure(loss, 4),
                "learningRate": learning_rate,
                "epoch": round(epoch, 2),
                "tokensPerSecond": _figure(tokens_per_second, 1),
            }
        )

    def evaluation(self, step: int, loss: float) -> None:
        """The mean loss per answer token on the held-out rows; step 0 is the base model."""
        log.info(
            "evaluation: step %d loss %.4f perplexity %.2f",
            step,
            loss,
            perplexity(loss),
            extra={"step": step, "eval_loss": _figure(loss, 6)},
        )
        self._update({"evalLoss": _figure(loss, 4)})

    def notice(self, notice: Notice) -> None:
        """Say what the training noticed or did: a line in the log, and into the status."""
        level = logging.WARNING if notice.warning else logging.INFO
        extra = {"code": notice.code, "step": notice.step}
        log.log(level, "%s: %s", notice.code, notice.text, extra=extra)
        self._notices = [*self._notices, notice][-NOTICE_LIMIT:]
        # A merge patch replaces lists: each has to be whole.
        dumped = [each.model_dump(mode="json", exclude_none=True) for each in self._notices]
        self._update({"notices": dumped})

    def transfer(self, what: str, total_bytes: int) -> Transfer:
        """Count bytes of a download or upload; the message shows the share."""
        return Transfer(self, what, total_bytes)

    def close(self) -> None:
        """Send what is left, shortly."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._dirty.set()
        if self._thread.is_alive():
            self._thread.join(timeout=REQUEST_SECONDS)

    def __enter__(self) -> Self:
        """Nothing happens yet."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Send what is left."""
        self.close()

    def forward(self, fields: dict[str, Any]) -> None:
        """Take over what the Reporter of a child process has collected."""
        self._update(fields)

    def set_quietly(self, message: str) -> None:
        """A message for the status only."""
        self._update({"message": message})

    def _update(self, fields: dict[str, Any]) -> None:
        if self._publisher is None:
            return
        with self._lock:
            self._fields.update(fields)
        self._dirty.set()

    def _send_loop(self) -> None:
        while not self._closing.is_set():
            self._dirty.wait()
            self._send()
            self._closing.wait(self._interval)
        self._send()
        if self._publisher:
            self._publisher.close()

    def _send(self) -> None:
        with self._lock:
            self._dirty.clear()
            fields, self._fields = self._fields, {}
        if not fields or self._publisher is None:
            return
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        try:
            self._publisher.publish({**fields, "lastUpdateTime": now})
        except (OSError, ValueError) as error:
            self._keep(fields)
            if not self._failed:
                log.warning("Progress can't be reported, the work goes on: %s", error)
            self._failed = True
        else:
            self._failed = False

    def _keep(self, fields: dict[str, Any]) -> None:
        """Put back what could not be sent, below what came in since."""
        with self._lock:
            self._fields = {**fields, **self._fields}


class Transfer:
    """Shows how far a download or upload is; called with bytes, from any thread."""

    def __init__(self, reporter: Reporter, what: str, total_bytes: int) -> None:
        self._reporter = reporter
        self._what = what
        self._total = max(total_bytes, 1)
        self._done = 0
        self._lock = threading.Lock()
        self._logged_percent = 0
        reporter.message(f"{what} ({size(total_bytes)})")

    def __call__(self, count: int) -> None:
        """Add `count` bytes."""
        with self._lock:
            self._done += count
            percent = min(100 * self._done // self._total, 100)
            loud = percent >= self._logged_percent + 25 and self._total > 100 << 20
            if loud:
                self._logged_percent = percent
        text = f"{self._what}: {percent}% of {size(self._total)}"
        if loud:
            log.info("%s", text)
        self._reporter.set_quietly(text)


class ApiServer:
    """Patches status.progress of one FineTuneJob with the pod's own token."""

    def __init__(self, job: JobReference, host: str, port: str, account: Path) -> None:
        import httpx  # noqa: PLC0415 - only needed in a cluster

        self._httpx = httpx
        address = f"[{host}]" if ":" in host else host
        self._url = f"https://{address}:{port}{status_path(job)}"
        self._account = account
        self._client: httpx.Client | None = None

    def publish(self, progress: dict[str, Any]) -> None:
        """One PATCH. The token is read each time, since the kubelet renews it."""
        if self._client is None:
            self._client = self._connect()
        token = (self._account / "token").read_text().strip()
        try:
            answer = self._client.patch(
                self._url,
                json={"status": {"progress": progress}},
                headers={
                    "Authorization": f"Bearer {token}",
                    "Content-Type": "application/merge-patch+json",
                },
            )
        except self._httpx.HTTPError as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from error
        if answer.is_error:
            raise ConnectionError(f"the API server answered {answer.status_code}")

    def close(self) -> None:
        """Close the connection."""
        if self._client:
            self._client.close()

    def _connect(self) -> httpx.Client:
        import ssl  # noqa: PLC0415

        context = ssl.create_default_context(cafile=str(self._account / "ca.crt"))
        return self._httpx.Client(verify=context, timeout=REQUEST_SECONDS, trust_env=False)


def reporter_for(job: JobReference | None, account: Path = SERVICE_ACCOUNT) -> Reporter:
    """Report to the API server when this is a pod of a FineTuneJob, else to the log only."""
    host = os.environ.get("KUBERNETES_SERVICE_HOST")
    port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if job is None or not host or not (account / "token").exists():
        return Reporter()
    return Reporter(ApiServer(job, host, port, account))


def _figure(value: float, digits: int) -> float | None:
    """Rounded; None for what JSON has no number for."""
    return round(value, digits) if math.isfinite(value) else None
