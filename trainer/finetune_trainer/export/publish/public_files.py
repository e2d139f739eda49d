"""What of a version may be read by others: the files that a push to the Hub brings there.

A bucket belongs to the team, a repository may be public. So the files are those of an allow-list,
and what says where the data lies, or quotes it, is left out or written anew:

    manifest.json                without buckets, samples and the dataset's columns
    SHA256SUMS, model.sig        of the files that go
    adapter/adapter_config.json  names a base model that is in a bucket without the bucket
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_trainer.contract import Artifact, Hub, PrivateFile, display_name
from finetune_trainer.export.publish import SHA256SUMS, Sign, sha256sums
from finetune_trainer.model.base_model import is_hub
from finetune_trainer.store.marker import MANIFEST
from finetune_trainer.store.versions import Version

PUBLIC_FOLDERS = ("adapter/", "merged/", "merged-fp8/", "gguf/")
PUBLIC_FILES = ("Modelfile", "README.md")
ADAPTER_CONFIG = "adapter/adapter_config.json"
BASE_MODEL = "base_model_name_or_path"

_TOP = ("stage", "fingerprint", "version", "created", "metrics")
_LINEAGE = (
    *("datasetRows", "evalRows", "model", "modelRevision", "modelCommit"),
    *("hyperparameters", "fingerprints", "versions"),
)
_GATE = ("rows", "tokens", "heldOut", "basePerplexity", "tunedPerplexity")


@dataclass(frozen=True)
class PublicFiles:
    """Files of a version that go as they are, and those that are written for the Hub."""

    stored: tuple[Artifact, ...]
    written: dict[str, bytes] = field(default_factory=dict)

    @property
    def paths(self) -> set[str]:
        return {item.path for item in self.stored} | self.written.keys()


def select_files(hub: Hub, version: Version) -> list[Artifact]:
    """The files of the version that go to the Hub in some form."""
    named = {*PUBLIC_FILES, *hub.include}
    return [
        item
        for item in version.marker.files
        if item.path in named or item.path.startswith(PUBLIC_FOLDERS)
    ]


def public_files(
    hub: Hub, version: Version, adapter_config: bytes | None, sign: Sign | None
) -> PublicFiles:
    """What a push brings; `adapter_config` is adapter/adapter_config.json as it is in the bucket.

    `sign` makes the signature of these files, where the version has one.
    """
    chosen = select_files(hub, version)
    written: dict[str, bytes] = {}
    if adapter_config is not None and (changed := _without_location(adapter_config)):
        written[ADAPTER_CONFIG] = changed
    stored = [item for item in chosen if item.path not in {*written, SHA256SUMS, MANIFEST}]
    written[SHA256SUMS] = sha256sums(_listed(stored, written))
    listed = _listed(stored, written)
    signature = sign(listed) if sign else {}
    written |= signature
    if PrivateFile.MANIFEST in hub.include:
        written[MANIFEST] = version.data
    else:
        written[MANIFEST] = public_manifest(version.data, _listed(stored, written))
    return PublicFiles(tuple(stored), written)


def public_manifest(data: bytes, files: Iterable[Artifact]) -> bytes:
    """manifest.json for the Hub: figures and names of what is there, and no place or row."""
    whole = json.loads(data)
    lineage = _only(whole.get("lineage") or {}, _LINEAGE)
    if not is_hub(lineage.get("model", "")):
        lineage["model"] = display_name(lineage["model"])
    lineage["hyperparameters"] = _without_places(lineage.get("hyperparameters", {}))
    public = {
        **_only(whole, _TOP),
        "files": [item.model_dump(mode="json", by_alias=True, exclude_none=True) for item in files],
        "lineage": lineage,
        "gate": _only(whole.get("gate") or {}, _GATE),
    }
    return json.dumps(public, indent=2, ensure_ascii=False).encode() + b"\n"


def _only(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _without_places(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings but for those that name a place."""
    return {
        name: _without_places(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if not (isinstance(value, str) and not is_hub(value))
    }


def _without_location(adapter_config: bytes) -> bytes | None:
    """adapter_config.json with the base model's name in place of its URI; None: it has none."""
    config = json.loads(adapter_config)
    base = config.get(BASE_MODEL)
    if not isinstance(base, str) or is_hub(base):
        return None
    changed = {**config, BASE_MODEL: display_name(base)}
    return json.dumps(changed, indent=2, ensure_ascii=False).encode()


def _listed(stored: Iterable[Artifact], written: Mapping[str, bytes]) -> tuple[Artifact, ...]:
    """All files as a manifest lists them."""
    made = [
        Artifact(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for path, data in written.items()
    ]
    return (*stored, *made)
