"""status.progress: what the trainer reports of itself, and where it is written."""

from __future__ import annotations

from typing import Any, Self

from finetune_trainer.contract.base import GROUP, PLURAL, VERSION, Base, Stage
from finetune_trainer.contract.notices import Notice
from finetune_trainer.contract.run import JobReference


def status_path(job: JobReference) -> str:
    """The API server's path of the FineTuneJob's status subresource."""
    return f"/apis/{GROUP}/{VERSION}/namespaces/{job.namespace}/{PLURAL}/{job.name}/status"


class Progress(Base):
    """How far the running stage is. Written by the trainer itself, at most every 10 seconds."""

    stage: Stage | None = None
    """The stage that reports."""

    job: str | None = None
    """The Job (batch/v1) whose pod reports."""

    step: int | None = None
    """Steps done."""

    total_steps: int | None = None
    """Steps in all."""

    percent: str | None = None
    """Share done, e.g. 35%."""

    epoch: float | None = None
    """Passes over the data so far."""

    loss: float | None = None
    """Training loss at the last logging step."""

    eval_loss: float | None = None
    """Loss on the held-out rows at the last evaluation."""

    learning_rate: float | None = None
    """Learning rate at the last logging step."""

    tokens_per_second: float | None = None
    """Tokens trained on per second, padding not counted."""

    eta: str | None = None
    """Time left in this stage, e.g. 4m10s."""

    message: str | None = None
    """What is being done."""

    notices: tuple[Notice, ...] = ()
    """The last 20 things that the running training noticed or did. The operator copies them to
    status.notices and makes Events of them."""

    last_update_time: str | None = None
    """When this was written (RFC 3339)."""

    def updated(self, newer: Progress) -> Self:
        """With the fields that `newer` sets, None included."""
        return self.model_copy(update={n: getattr(newer, n) for n in newer.model_fields_set})

    def merge_patch(self) -> dict[str, Any]:
        """A merge patch with the fields that are set here: null clears one, others stay."""
        patch = self.model_dump(mode="json", exclude_unset=True)
        # A merge patch replaces lists as a whole, and nulls in one would stay.
        if "notices" in patch:
            notices = [each.model_dump(mode="json", exclude_none=True) for each in self.notices]
            patch["notices"] = notices or None
        return patch
