"""What a child says about its progress, in the log and in the status."""

from __future__ import annotations

from finetune_trainer.base_model.child import OnProgress
from finetune_trainer.progress import Reporter, Transfer


def shown_by(reporter: Reporter | None, what: str) -> OnProgress | None:
    """A listener to bytes done and to be done; None where nobody looks."""
    return None if reporter is None else _Shown(reporter, what)


class _Shown:
    def __init__(self, reporter: Reporter, what: str) -> None:
        self._reporter = reporter
        self._what = what
        self._transfer: Transfer | None = None
        self._done = 0

    def __call__(self, done: int, total: int) -> None:
        if self._transfer is None:
            self._transfer = self._reporter.transfer(self._what, total)
        self._transfer(done - self._done)
        self._done = done
