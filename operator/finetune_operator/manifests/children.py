"""Names, labels and owners of all children; and those that a Job needs: run.json, and its rights.

A name is a function of what the object is for, so that making the same thing twice is one object.
The hash tells apart what the readable part can't: a FineTuneJob's name may have 253 characters,
a Job's only 63 (it becomes a label of its pods).
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from finetune_operator.api import base
from finetune_operator.api.base import (
    ATTEMPT_LABEL,
    FINETUNEJOB_LABEL,
    FINETUNEJOB_UID_LABEL,
    MANAGED_BY_LABEL,
    OPERATOR,
    STAGE_LABEL,
)
from finetune_operator.api.finetunejob import FineTuneJobSpec
from finetune_operator.observe import ObservedFineTuneJob
from finetune_trainer.contract import GROUP, PLURAL, Hardware, JobReference, Resolved, Stage

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
        "app.kubernetes.io/part-of": OPERATOR,
        MANAGED_BY_LABEL: OPERATOR,
        FINETUNEJOB_LABEL: name,
        FINETUNEJOB_UID_LABEL: job.uid,
    }


def stage_labels(job: ObservedFineTuneJob, stage: Stage, attempt: int) -> dict[str, str]:
    """Labels of one attempt's Job and pods."""
    return {
        **common_labels(job),
        "app.kubernetes.io/component": str(stage),
        STAGE_LABEL: str(stage),
        ATTEMPT_LABEL: str(attempt),
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


ROLE = "progress"
RBAC = "rbac.authorization.k8s.io"


def service_account_name(job: ObservedFineTuneJob, users: str | None) -> str:
    """The ServiceAccount of the pods: the user's, or one of the job's own."""
    return users or child_name(job, ROLE)


def progress_access(job: ObservedFineTuneJob, users: str | None) -> tuple[dict[str, Any], ...]:
    """Role and binding, and a ServiceAccount where the user named none."""
    account = service_account_name(job, users)
    role = child_name(job, ROLE)
    binding = {
        "apiVersion": f"{RBAC}/v1",
        "kind": "RoleBinding",
        # A binding is never changed, only made: so another ServiceAccount gets another one.
        "metadata": metadata(job, child_name(job, ROLE, account)),
        "roleRef": {"apiGroup": RBAC, "kind": "Role", "name": role},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": job.namespace}],
    }
    own = () if users else (_service_account(job, account),)
    return (*own, _role(job, role), binding)


def _service_account(job: ObservedFineTuneJob, name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": metadata(job, name),
        "automountServiceAccountToken": False,
    }


def _role(job: ObservedFineTuneJob, name: str) -> dict[str, Any]:
    rule = {
        "apiGroups": [GROUP],
        "resources": [f"{PLURAL}/status"],
        "resourceNames": [job.name],
        "verbs": ["patch"],
    }
    return {
        "apiVersion": f"{RBAC}/v1",
        "kind": "Role",
        "metadata": metadata(job, name),
        "rules": [rule],
    }
