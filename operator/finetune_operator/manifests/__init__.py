"""Builders of the objects that a stage needs. Pure: values in, plain objects out."""

from finetune_operator.manifests.stage_job import pod_settings_digest
from finetune_operator.manifests.stage_objects import StageObjects, stage_objects

__all__ = ["StageObjects", "pod_settings_digest", "stage_objects"]
