"""The ConfigMap with run.json: what a stage is told."""

from __future__ import annotations

import json
from typing import Any

from finetune_operator.api.finetunejob import FineTuneJobSpec
from finetune_operator.manifests.names import child_name, metadata
from finetune_operator.observe import ObservedFineTuneJob
from finetune_trainer.contract import Hardware, JobReference, Resolved

FILE = "run.json"


def run_config_map(
    job: ObservedFineTuneJob,
    spec: FineTuneJobSpec,
    resolved: Resolved | None,
    hardware: Hardware,
) -> dict[str, Any]:
    """An immutable ConfigMap, named by its content: another content is another object."""
    reference = JobReference(name=job.name, namespace=job.namespace)
    told = spec.run_config(reference, resolved, hardware)
    config = told.model_dump(mode="json", exclude_none=True)
    content = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(job, child_name(job, "run", content)),
        "immutable": True,
        "data": {FILE: content},
    }
