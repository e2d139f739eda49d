"""What the present training says of itself: into status, and each notice as one Event."""

from __future__ import annotations

from collections.abc import Iterator

from finetune_operator.plan.draft import Draft
from finetune_trainer.contract import Notice, Stage

LIMIT = 50  # notices in status; further ones are in the log only


def take_in_notices(draft: Draft) -> None:
    """Announce and remember each notice about the present training that status doesn't hold."""
    known = draft.found.notices
    fresh = [notice for notice in dict.fromkeys(_said(draft)) if notice not in known]
    for notice in fresh[: max(LIMIT - len(known), 0)]:
        draft.announce(notice, scope=draft.key(Stage.TRAIN) or "")
        known = (*known, notice)
    if fresh:
        draft.found.notices = known


def _said(draft: Draft) -> Iterator[Notice]:
    """Live, and with the last word of each attempt. The progress of an earlier training stands
    until the next one begins to report, so it counts only from a Job of this training."""
    runs = draft.runs_of(Stage.TRAIN)
    if draft.job.reported.job in {run.name for run in runs}:
        yield from draft.job.reported.notices
    for run in runs:
        result = run.pod.result if run.pod is not None else None
        if result is not None and result.stage is Stage.TRAIN:
            yield from result.notices
