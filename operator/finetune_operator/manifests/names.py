"""Names, labels and owners of the children.

A name is a function of what the object is for, so that making the same thing twice is one object.
The hash tells apart what the readable part can't: a FineTuneJob's name may have 253 characters,
a Job's only 63 (it becomes a label of its pods).
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from finetune_operator.api import base, labels
from finetune_operator.observe import ObservedFineTuneJob
from finetune_trainer.contract import Stage

NAME_LIMIT = 63
HASH_LENGTH = 10


def digest(*parts: object) -> str:
    """Hash of values that JSON can write, short enough for a name."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]


def child_name(job: ObservedFineTuneJob, role: str, *parts: object) -> str:
    """`<job>-<role>-<hash>`, a valid name of any child; the hash covers uid, role and parts."""
    suffix = f"-{role}-{digest(job.uid, role, *parts)}"
    readable = job.name.replace(".", "-")[: NAME_LIMIT - len(suffix)].rstrip("-")
    return readable + suffix


def label_value(text: str) -> str:
    """A text as the value of a label, cut and made unique by a hash where it is too long."""
    if len(text) <= NAME_LIMIT:
        return text
    return text[: NAME_LIMIT - HASH_LENGTH - 1].rstrip("-.") + "-" + digest(text)


def common_labels(job: ObservedFineTuneJob) -> dict[str, str]:
    """Labels of every child."""
    name = label_value(job.name)
    return {
        "app.kubernetes.io/name": "finetune-trainer",
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/part-of": labels.OPERATOR,
        labels.MANAGED_BY: labels.OPERATOR,
        labels.JOB: name,
        labels.JOB_UID: job.uid,
    }


def stage_labels(job: ObservedFineTuneJob, stage: Stage, attempt: int) -> dict[str, str]:
    """Labels of one attempt's Job and pods."""
    return {
        **common_labels(job),
        "app.kubernetes.io/component": str(stage),
        labels.STAGE: str(stage),
        labels.ATTEMPT: str(attempt),
    }


def metadata(job: ObservedFineTuneJob, name: str) -> dict[str, Any]:
    """Metadata of a child that is collected with its FineTuneJob."""
    owner = {
        "apiVersion": base.API_VERSION,
        "kind": base.KIND,
        "name": job.name,
        "uid": job.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
    return {
        "name": name,
        "namespace": job.namespace,
        "labels": common_labels(job),
        "ownerReferences": [owner],
    }
