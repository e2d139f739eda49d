"""Build the Kubernetes objects that a stage needs. Pure: values in, plain objects out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from finetune_operator.api import JsonObject
from finetune_operator.api.finetunejob import FineTuneJobSpec
from finetune_operator.manifests.children import progress_access, run_config_map
from finetune_operator.manifests.stage_job import Attempt, pod_settings_digest, stage_job
from finetune_operator.observe import ObservedFineTuneJob
from finetune_operator.settings import Settings
from finetune_trainer.contract import Hardware, Resolved, Stage

__all__ = ["StageObjects", "pod_settings_digest", "stage_objects"]


@dataclass(frozen=True)
class StageObjects:
    """The objects of one attempt."""

    access: tuple[JsonObject, ...]
    """ServiceAccount, Role and RoleBinding for the live progress."""

    config_map: JsonObject
    job: JsonObject

    def __iter__(self) -> Iterator[JsonObject]:
        # The Job last, since its pod needs the others.
        yield from (*self.access, self.config_map, self.job)


def stage_objects(
    owner: ObservedFineTuneJob,
    spec: FineTuneJobSpec,
    settings: Settings,
    *,
    stage: Stage,
    stage_key: str,
    attempt: int,
    resolved: Resolved | None,
    hardware: Hardware,
) -> StageObjects:
    config_map = run_config_map(owner, spec, resolved, hardware)
    name, needs = config_map["metadata"]["name"], resolved.needs if resolved else None
    which = Attempt(stage, stage_key, attempt, name, hardware, needs)
    return StageObjects(
        access=progress_access(owner, spec.service_account_name),
        config_map=config_map,
        job=stage_job(owner, spec, which, settings),
    )
