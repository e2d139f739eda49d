"""Publishing a few small files, as the export stage publishes its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from finetune_trainer.contract import Artifact, Stage, digest
from finetune_trainer.export.publish import Publication, Sign, finish
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import Folder
from finetune_trainer.store.versions import VersionMarker, version_name

Version = Mapping[str, bytes]
"""Contents by path."""


def fingerprint(name: str) -> str:
    """A fingerprint as exports have them."""
    return digest(name)


def folder(name: str) -> str:
    """Where the version of that name lies."""
    return f"versions/{version_name(fingerprint(name))}"


def manifest(name: str, files: tuple[Artifact, ...]) -> bytes:
    marker = VersionMarker(
        stage=Stage.EXPORT,
        fingerprint=fingerprint(name),
        version=version_name(fingerprint(name)),
        files=files,
    )
    return marker.model_dump_json().encode()


def publish(
    output: Folder, workspace: Path, name: str, version: Version, sign: Sign | None = None
) -> None:
    """What a stage does: publish what stands already, or else compute it."""
    if finish(output, fingerprint(name)):
        return
    with Publication(output, fingerprint(name), Reporter()) as publication:
        for path, data in version.items():
            file = workspace / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            publication.add(file, path)
        publication.commit(lambda files: manifest(name, files), sign)
