"""The right to report progress: to patch the status of one FineTuneJob, and nothing else."""

from __future__ import annotations

from typing import Any

from finetune_operator.manifests.names import child_name, metadata
from finetune_operator.observe import ObservedFineTuneJob
from finetune_trainer.contract import GROUP, PLURAL

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
