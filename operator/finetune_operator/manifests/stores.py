"""What a pod needs for its object stores: keys and certificates, by reference."""

from __future__ import annotations

from finetune_operator.api import CaBundle, JsonObject
from finetune_operator.api.finetunejob import AnyStorageSpec, FineTuneJobSpec
from finetune_trainer.contract import Stage
from finetune_trainer.contract.storage import CA_BUNDLES, CREDENTIALS

CERTIFICATES_FOLDER = "/etc/finetune-ca"
CERTIFICATES_FILE = "ca.crt"
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
    files = [
        f"{store.field}.caBundle={_folder(store)}/{CERTIFICATES_FILE}"
        for store, _ in _bundles(spec, stage)
    ]
    return [*found, *([{"name": CA_BUNDLES, "value": ":".join(files)}] if files else [])]


def certificate_mounts(spec: FineTuneJobSpec, stage: Stage) -> list[JsonObject]:
    """Where each store's certificates are."""
    return [
        {"name": _volume(store), "mountPath": _folder(store), "readOnly": True}
        for store, _ in _bundles(spec, stage)
    ]


def certificate_volumes(spec: FineTuneJobSpec, stage: Stage) -> list[JsonObject]:
    """The ConfigMaps and Secrets that hold them.

    They are optional for the kubelet, which would wait for them for ever: the trainer says at once
    what is missing.
    """
    return [{"name": _volume(store), **_source(bundle)} for store, bundle in _bundles(spec, stage)]


def _source(bundle: CaBundle) -> JsonObject:
    if bundle.config_map_ref is not None:
        reference, kind, name = bundle.config_map_ref, "configMap", "name"
    else:
        assert bundle.secret_ref is not None, "a CaBundle has one of the two"  # noqa: S101
        reference, kind, name = bundle.secret_ref, "secret", "secretName"
    items = [{"key": reference.key, "path": CERTIFICATES_FILE}]
    return {kind: {name: reference.name, "items": items, "optional": True}}


def _bundles(spec: FineTuneJobSpec, stage: Stage) -> list[tuple[AnyStorageSpec, CaBundle]]:
    return [(each, each.ca_bundle) for each in spec.stores(stage) if each.ca_bundle is not None]


def _volume(store: AnyStorageSpec) -> str:
    # spec.storage, spec.dataset.storage, spec.model.storage
    return "-".join(["ca", *store.field.split(".")[1:]])


def _folder(store: AnyStorageSpec) -> str:
    return f"{CERTIFICATES_FOLDER}/{_volume(store).removeprefix('ca-')}"
