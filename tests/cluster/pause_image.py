"""The image of the container that holds a pod's namespaces: one static program that sleeps."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

REFERENCE = "localhost/pause:1"


def _add(archive: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    entry.mode = mode
    archive.addfile(entry, io.BytesIO(content))


def _layer(busybox: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as layer:
        _add(layer, "busybox", busybox.read_bytes(), 0o755)
    return buffer.getvalue()


def write(archive: Path, busybox: Path, architecture: str) -> Path:
    """Write the image as a docker-archive that containerd can import."""
    layer = _layer(busybox)
    config = {
        "architecture": architecture,
        "os": "linux",
        "config": {"Entrypoint": ["/busybox", "sleep", "2147483647"], "User": "65535:65535"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    encoded = json.dumps(config).encode()
    name = f"{hashlib.sha256(encoded).hexdigest()}.json"
    manifest = [{"Config": name, "RepoTags": [REFERENCE], "Layers": ["layer.tar"]}]
    with tarfile.open(archive, "w") as image:
        _add(image, name, encoded)
        _add(image, "layer.tar", layer)
        _add(image, "manifest.json", json.dumps(manifest).encode())
    return archive
