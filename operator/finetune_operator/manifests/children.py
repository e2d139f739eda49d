"""Names, labels and owners of a FineTuneJob's children; run.json, the right to report progress, and
the keys of a pod's object stores, by reference.

The name of a child is a function of its purpose, so creating it twice leads to one object. A
FineTuneJob's name may have 253 characters, but a Job's only 63, since it becomes a label of its
pods. So the readable part is cut, and a hash keeps the names apart.
"""

from __future__ import annotations

import hashlib
import json

from finetune_operator.api import (
    API_VERSION,
    ATTEMPT_LABEL,
    FINETUNEJOB_LABEL,
    FINETUNEJOB_UID_LABEL,
    KIND,
    MANAGED_BY_LABEL,
    OPERATOR,
    STAGE_LABEL,
    JsonObject,
)
from finetune_operator.api.finetunejob import FineTuneJobSpec
from finetune_operator.manifests.volumes import certificate_files
from finetune_operator.observe import ObservedFineTuneJob
from finetune_trainer.contract import GROUP, PLURAL, Hardware, JobReference, Resolved, Stage
from finetune_trainer.contract.output import CA_BUNDLES, CREDENTIALS

NAME_LIMIT = 63
HASH_LENGTH = 10
RUN_CONFIG_FILE = "run.json"
PROGRESS_ROLE = "progress"
RBAC = "rbac.authorization.k8s.io"


def digest(*parts: object) -> str:
    """A hash of JSON values, short enough for a name."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]


def child_name(owner: ObservedFineTuneJob, role: str, *parts: object) -> str:
    """`<FineTuneJob>-<role>-<hash>`; the hash covers uid, role and parts."""
    suffix = f"-{role}-{digest(owner.uid, role, *parts)}"
    readable = owner.name.replace(".", "-")[: NAME_LIMIT - len(suffix)].rstrip("-")
    return readable + suffix


def label_value(text: str) -> str:
    """A text as the value of a label; if it is too long, it is cut and gets a hash."""
    if len(text) <= NAME_LIMIT:
        return text
    return text[: NAME_LIMIT - HASH_LENGTH - 1].rstrip("-.") + "-" + digest(text)


def common_labels(owner: ObservedFineTuneJob) -> dict[str, str]:
    """Labels of every child."""
    name = label_value(owner.name)
    return {
        "app.kubernetes.io/name": "finetune-trainer",
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/part-of": OPERATOR,
        MANAGED_BY_LABEL: OPERATOR,
        FINETUNEJOB_LABEL: name,
        FINETUNEJOB_UID_LABEL: owner.uid,
    }


def stage_labels(owner: ObservedFineTuneJob, stage: Stage, attempt: int) -> dict[str, str]:
    """Labels of one attempt's Job and pods."""
    return {
        **common_labels(owner),
        "app.kubernetes.io/component": str(stage),
        STAGE_LABEL: str(stage),
        ATTEMPT_LABEL: str(attempt),
    }


def metadata(owner: ObservedFineTuneJob, name: str) -> JsonObject:
    """Metadata of a child, which is garbage collected with its FineTuneJob."""
    reference = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": owner.name,
        "uid": owner.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
    return {
        "name": name,
        "namespace": owner.namespace,
        "labels": common_labels(owner),
        "ownerReferences": [reference],
    }


def run_config_map(
    owner: ObservedFineTuneJob,
    spec: FineTuneJobSpec,
    resolved: Resolved | None,
    hardware: Hardware,
) -> JsonObject:
    """The immutable ConfigMap with run.json. Its name depends on its content."""
    job_reference = JobReference(name=owner.name, namespace=owner.namespace)
    run_config = spec.run_config(job_reference, resolved, hardware)
    config = run_config.model_dump(mode="json", exclude_none=True)
    content = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(owner, child_name(owner, "run", content)),
        "immutable": True,
        "data": {RUN_CONFIG_FILE: content},
    }


def service_account_name(owner: ObservedFineTuneJob, users: str | None) -> str:
    """The ServiceAccount of the pods: the user's, or one that the operator creates."""
    return users or child_name(owner, PROGRESS_ROLE)


def progress_access(owner: ObservedFineTuneJob, users: str | None) -> tuple[JsonObject, ...]:
    """The right to patch the status of this one FineTuneJob, and nothing else.

    Role and binding, and a ServiceAccount unless the user named one.
    """
    account = service_account_name(owner, users)
    role = child_name(owner, PROGRESS_ROLE)
    binding = {
        "apiVersion": f"{RBAC}/v1",
        "kind": "RoleBinding",
        # Bindings are created and never changed, so each ServiceAccount gets its own.
        "metadata": metadata(owner, child_name(owner, PROGRESS_ROLE, account)),
        "roleRef": {"apiGroup": RBAC, "kind": "Role", "name": role},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": owner.namespace}],
    }
    own = () if users else (_service_account(owner, account),)
    return (*own, _role(owner, role), binding)


def _service_account(owner: ObservedFineTuneJob, name: str) -> JsonObject:
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": metadata(owner, name),
        "automountServiceAccountToken": False,
    }


def _role(owner: ObservedFineTuneJob, name: str) -> JsonObject:
    rule = {
        "apiGroups": [GROUP],
        "resources": [f"{PLURAL}/status"],
        "resourceNames": [owner.name],
        "verbs": ["patch"],
    }
    return {
        "apiVersion": f"{RBAC}/v1",
        "kind": "Role",
        "metadata": metadata(owner, name),
        "rules": [rule],
    }


REQUIRED = CREDENTIALS[:2]


def from_secret(name: str, secret: str, key: str, *, optional: bool = False) -> JsonObject:
    """An environment variable with the value of a Secret's key."""
    reference: JsonObject = {"name": secret, "key": key}
    if optional:
        reference["optional"] = True
    return {"name": name, "valueFrom": {"secretKeyRef": reference}}


def store_references(spec: FineTuneJobSpec, stage: Stage) -> list[JsonObject]:
    """What a stage's pod refers to, beside the Secret of spec.storage; for a digest."""
    found: list[JsonObject] = []
    for store in spec.stores(stage):
        kept = {"ca_bundle"} if store.field == spec.storage.field else {"ca_bundle", "secret_ref"}
        references = store.model_dump(mode="json", include=kept, exclude_none=True)
        if references:
            found.append({store.field: references})
    return found


def store_variables(spec: FineTuneJobSpec, stage: Stage) -> list[JsonObject]:
    """The keys of each store, under the names that the trainer looks for."""
    found = [
        from_secret(store.variables + key, store.secret_ref.name, key, optional=key not in REQUIRED)
        for store in spec.stores(stage)
        if store.secret_ref is not None
        for key in CREDENTIALS
    ]
    files = certificate_files(spec, stage)
    return [*found, *([{"name": CA_BUNDLES, "value": ":".join(files)}] if files else [])]
