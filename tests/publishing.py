"""Publishing a few small files, as the export stage publishes its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from finetune_trainer.contract import Artifact, Stage
from finetune_trainer.export.publish import Publication, finish_interrupted
from finetune_trainer.export.publish.publication import Sign
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import Folder
from finetune_trainer.store.marker import Marker

Version = Mapping[str, bytes]
"""Contents by path."""


def manifest(fingerprint: str, files: tuple[Artifact, ...]) -> bytes:
    """What is written last."""
    marker = Marker(stage=Stage.EXPORT, fingerprint=fingerprint, files=files)
    return marker.model_dump_json().encode()


def publish(
    output: Folder, room: Path, name: str, version: Version, sign: Sign | None = None
) -> None:
    """What a stage does: finish what was interrupted, else compute and publish."""
    if finish_interrupted(output, name):
        return
    with Publication(output, name, Reporter()) as publication:
        for path, data in version.items():
            file = room / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            publication.add(file, path)
        publication.commit(lambda files: manifest(name, files), sign)
