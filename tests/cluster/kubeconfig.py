"""Writes kubeconfig files: one cluster, one user with a bearer token, one context."""

from __future__ import annotations

import base64
from pathlib import Path

import yaml


def write(path: Path, *, server: str, ca: Path, token: str, namespace: str = "default") -> Path:
    """Write a kubeconfig that is complete in itself, so that it can be copied and mounted."""
    authority = base64.b64encode(ca.read_bytes()).decode()
    cluster = {"server": server, "certificate-authority-data": authority}
    context = {"cluster": "finetune", "user": "finetune", "namespace": namespace}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "finetune",
        "clusters": [{"name": "finetune", "cluster": cluster}],
        "users": [{"name": "finetune", "user": {"token": token}}],
        "contexts": [{"name": "finetune", "context": context}],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
