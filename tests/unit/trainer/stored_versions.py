"""Output folders with versions in them, for the tests of versions and of their pruning."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from finetune_trainer.contract import Fingerprints, Stage, digest
from finetune_trainer.store import LocalFolder
from finetune_trainer.store.marker import MANIFEST
from finetune_trainer.store.versions import Version, find_version, list_versions, version_name

FILES = {"gguf/model-F16.gguf": b"F16", "README.md": b"card"}


def prints(name: str) -> Fingerprints:
    """The export's is of the name, the training's of its first letter, and all have one dataset."""
    return Fingerprints(prepare=digest("data"), train=digest(name[0]), export=digest(name))


def listed(files: dict[str, bytes]) -> list[dict[str, Any]]:
    return [
        {"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for path, data in files.items()
    ]


def written(output: LocalFolder, name: str, at: str, files: dict[str, bytes] = FILES) -> Version:
    """A version with its manifest, and the results of the stages before it; not the current one."""
    of = prints(name)
    fields = {
        "stage": "export",
        "fingerprint": of.export,
        "version": version_name(of.export),
        "created": at,
        "files": listed(files),
        "lineage": {"fingerprints": of.model_dump(), "model": "a/b"},
    }
    folder = f"versions/{version_name(of.export)}"
    for path, data in files.items():
        output.write(f"{folder}/{path}", data)
    output.write(f"{folder}/{MANIFEST}", json.dumps(fields).encode())
    for stage in (Stage.PREPARE, Stage.TRAIN):
        output.write(f"stages/{stage}/{getattr(of, stage)}/complete.json", b"{}")
    output.write(f"stages/train/{of.train}/checkpoints/10/weights", b"w")
    version = find_version(output, of.export)
    assert version is not None
    return version


def first_release(output: LocalFolder, files: dict[str, bytes] = FILES) -> bytes:
    """What 0.1.0 leaves; returns its manifest."""
    for path, data in files.items():
        output.write(path, data)
    fields = {
        "stage": "export",
        "fingerprint": "of 0.1.0",
        "files": listed(files),
        "created": "2026-01-01T00:00:00Z",
        "lineage": {
            "dataset": "s3://d/a.csv",
            "fingerprints": {"prepare": "p0", "train": "t0", "export": "of 0.1.0"},
        },
        "metrics": {"evalLoss": 1.5},
    }
    data = json.dumps(fields, indent=2).encode()
    output.write(MANIFEST, data)
    for stage in ("prepare/p0", "train/t0"):
        output.write(f"stages/{stage}/complete.json", b"{}")
    return data


def names(output: LocalFolder) -> list[str]:
    return [version.name for version in list_versions(output)]
