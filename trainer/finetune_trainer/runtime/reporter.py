"""How far the work is: a line in the log, and `status.progress` of the FineTuneJob.

A thread of its own patches the status, at most every ten seconds, so the work never waits for the
API server. When a patch fails, one warning is logged and the work goes on.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from finetune_trainer.contract import JobReference, Notice, Progress, Stage, status_path
from finetune_trainer.contract.base import redact
from finetune_trainer.runtime import Transfer, Work, duration, perplexity, timestamp

if TYPE_CHECKING:
    import httpx

INTERVAL_SECONDS = 10.0
REQUEST_SECONDS = 5.0
HEARTBEAT_SECONDS = 60  # by which the operator tells a slow training from a trainer that hangs
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
# Set by the operator: the Job of this pod, by which it knows whose notices it reads.
JOB_VARIABLE = "FINETUNE_JOB"
NOTICE_LIMIT = 20  # the last so many stand in status.progress; all are in the log

_PART: ContextVar[str | None] = ContextVar("part", default=None)  # of the work, by this thread

log = logging.getLogger(__name__)


class Publisher(Protocol):
    """Brings changes of status.progress to where people look."""

    def publish(self, changes: Progress) -> None:
        """Send the fields that are set in `changes`; raises OSError or ValueError."""

    def close(self) -> None:
        """Release connections."""


class Reporter:
    """Collects what the stages report, and publishes it from time to time."""

    def __init__(
        self,
        publisher: Publisher | None = None,
        interval: float = INTERVAL_SECONDS,
        heartbeat: float | None = None,
    ):
        """With a heartbeat it publishes the time, once in so many seconds, even without news."""
        self._publisher = publisher
        self._interval = interval
        self._heartbeat = heartbeat
        self._begun = False
        self._work: Work | None = None
        self._percent = 0
        self._work_lock = threading.Lock()
        self._changes = Progress()  # not published yet
        self._notices: tuple[Notice, ...] = ()
        self._dirty = threading.Event()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._failed = False
        self._thread = threading.Thread(target=self._send_loop, name="progress", daemon=True)
        if publisher:
            self._thread.start()

    def begin(self, stage: Stage, message: str) -> None:
        """A stage begins: clear what no longer applies.

        What the training reported last (loss, notices) stays, except for `train`.
        """
        self._work = None
        log.info("%s", message)
        # One update, so that nobody sees the new stage with the message of the one before.
        changes = Progress(
            stage=stage,
            job=os.environ.get(JOB_VARIABLE),
            heartbeat_seconds=None if self._heartbeat is None else round(self._heartbeat),
            message=message,
            step=None,
            total_steps=None,
            percent=None,
            epoch=None,
            learning_rate=None,
            tokens_per_second=None,
            eta=None,
        )
        if stage is Stage.TRAIN:
            self._notices = ()
            changes = changes.updated(
                Progress(
                    loss=None,
                    eval_loss=None,
                    reward_accuracy=None,
                    reward_margin=None,
                    notices=(),
                )
            )
        self._begun = True
        self.update(changes)

    def done(self, message: str) -> None:
        """The stage is done; its caller logs the last line."""
        self.update(Progress(percent="100%", eta=None, message=message))

    def message(self, text: str) -> None:
        """Say what is being done, in the log and in the status."""
        log.info("%s", text)
        self.update(Progress(message=text))

    def expect_work(self, seconds: Mapping[str, float]) -> None:
        """The stage's parts, with the seconds that each should take.

        From then on, percent and ETA are of all of them together; `part` says which is at work.
        When more is known, it can be called again: percent never goes back.
        """
        if self._work:
            self._work.reweigh(seconds)
        else:
            self._work, self._percent = Work(seconds), 0
        self._show_work(self._work)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What this thread does is that part of the work, which is done when the block is."""
        before = _PART.set(name)
        try:
            yield
        finally:
            _PART.reset(before)
        self._advance(name, 1.0)

    def skip(self, parts: Iterable[str]) -> None:
        """Parts that needn't be done."""
        if self._work:
            for name in parts:
                self._work.skip(name)
            self._show_work(self._work)

    @property
    def parts(self) -> tuple[str, ...]:
        """Of the work, by their names."""
        return self._work.parts if self._work else ()

    def share_of_part(self) -> Callable[[float], None] | None:
        """What takes the share that is done of this thread's part; None where it does none."""
        name = _PART.get()
        return partial(self._advance, name) if self._work and name else None

    def _advance(self, name: str, share: float) -> None:
        if self._work:
            self._work.advance(name, share)
            self._show_work(self._work)

    def _show_work(self, work: Work) -> None:
        with self._work_lock:
            self._percent = max(self._percent, min(99, int(100 * work.share)))
            percent, eta = f"{self._percent}%", duration(work.seconds_left)
            self.update(Progress(step=None, total_steps=None, percent=percent, eta=eta))

    def steps(self, step: int, total: int, *, eta_seconds: float | None = None) -> None:
        self.update(
            Progress(
                step=step,
                total_steps=total,
                percent=f"{100 * step // max(total, 1)}%",
                eta=None if eta_seconds is None else duration(eta_seconds),
            )
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
        """The figures of a logging step, in the log and in the status."""
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
        self.update(
            Progress(
                loss=_figure(loss, 4),
                learning_rate=learning_rate,
                epoch=round(epoch, 2),
                tokens_per_second=_figure(tokens_per_second, 1),
            )
        )

    def evaluation(
        self,
        step: int,
        loss: float,
        reward_accuracy: float | None = None,
        reward_margin: float | None = None,
    ) -> None:
        """The mean loss on the held-out rows, of preferences with rewards; step 0 is the base."""
        extra = {"step": step, "eval_loss": _figure(loss, 6)}
        if reward_accuracy is None or reward_margin is None:
            figures = f"perplexity {perplexity(loss):.2f}"
        else:
            figures = f"reward accuracy {reward_accuracy:.1%} reward margin {reward_margin:.4f}"
            accuracy, margin = _figure(reward_accuracy, 4), _figure(reward_margin, 4)
            self.update(Progress(reward_accuracy=accuracy, reward_margin=margin))
            extra |= {"reward_accuracy": accuracy, "reward_margin": margin}
        log.info("evaluation: step %d loss %.4f %s", step, loss, figures, extra=extra)
        self.update(Progress(eval_loss=_figure(loss, 4)))

    def notice(self, notice: Notice) -> None:
        """Say what the training noticed or did, in the log and in the status."""
        level = logging.WARNING if notice.warning else logging.INFO
        extra = {"code": notice.code, "step": notice.step}
        log.log(level, "%s: %s", notice.code, notice.text, extra=extra)
        self._notices = (*self._notices, notice)[-NOTICE_LIMIT:]
        self.update(Progress(notices=self._notices))

    def transfer(self, what: str, total_bytes: int) -> Transfer:
        """Count bytes of a download or upload; the message shows the share."""
        return Transfer(self, what, total_bytes, self.share_of_part())

    def close(self) -> None:
        """Send what is left, for some seconds at most."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._dirty.set()
        if self._thread.is_alive():
            self._thread.join(timeout=REQUEST_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, changes: Progress) -> None:
        """Change the fields that are set in `changes`, in the status only; None clears one."""
        if self._publisher is None:
            return
        with self._lock:
            self._changes = self._changes.updated(changes)
        self._dirty.set()

    def _send_loop(self) -> None:
        while not self._closing.is_set():
            news = self._dirty.wait(self._heartbeat)
            self._send(renew=self._begun and not news)
            self._closing.wait(self._interval)
        self._send()
        if self._publisher:
            self._publisher.close()

    def _send(self, *, renew: bool = False) -> None:
        with self._lock:
            self._dirty.clear()
            changes, self._changes = self._changes, Progress()
        if self._publisher is None or not (changes.model_fields_set or renew):
            return
        try:
            self._publisher.publish(
                _redacted(changes).updated(Progress(last_update_time=timestamp()))
            )
        except (OSError, ValueError) as error:
            with self._lock:  # try again, with what came in since
                self._changes = changes.updated(self._changes)
            if not self._failed:
                log.warning("Progress can't be reported, the work goes on: %s", error)
            self._failed = True
        else:
            self._failed = False


class ApiServer:
    """Patches status.progress of one FineTuneJob with the pod's own token."""

    def __init__(self, job: JobReference, host: str, port: str, account: Path) -> None:
        import httpx  # noqa: PLC0415 - only needed in a cluster

        self._httpx = httpx
        address = f"[{host}]" if ":" in host else host
        self._url = f"https://{address}:{port}{status_path(job)}"
        self._account = account
        self._client: httpx.Client | None = None

    def publish(self, changes: Progress) -> None:
        if self._client is None:
            self._client = self._connect()
        # The kubelet renews the token, so it is read each time.
        token = (self._account / "token").read_text().strip()
        try:
            answer = self._client.patch(
                self._url,
                json={"status": {"progress": changes.merge_patch()}},
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
        if self._client:
            self._client.close()

    def _connect(self) -> httpx.Client:
        import ssl  # noqa: PLC0415

        context = ssl.create_default_context(cafile=str(self._account / "ca.crt"))
        return self._httpx.Client(verify=context, timeout=REQUEST_SECONDS, trust_env=False)


def part_of(reporter: Reporter | None, name: str) -> AbstractContextManager[None]:
    """As Reporter.part, where somebody looks."""
    return reporter.part(name) if reporter else nullcontext()


def reporter_for(job: JobReference | None, account: Path = SERVICE_ACCOUNT) -> Reporter:
    """Reports to the API server in a pod of a FineTuneJob, elsewhere to the log only."""
    host = os.environ.get("KUBERNETES_SERVICE_HOST")
    port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if job is None or not host or not (account / "token").exists():
        return Reporter()
    return Reporter(ApiServer(job, host, port, account), heartbeat=HEARTBEAT_SECONDS)


def _redacted(changes: Progress) -> Progress:
    if changes.message:
        changes = changes.updated(Progress(message=redact(changes.message)))
    if changes.notices:
        notices = tuple(each.redacted() for each in changes.notices)
        changes = changes.updated(Progress(notices=notices))
    return changes


def _figure(value: float, digits: int) -> float | None:
    """Rounded; None for what JSON has no number for."""
    return round(value, digits) if math.isfinite(value) else None
