"""Where a new version waits until it is whole: `stages/export/<fingerprint>/` of the output.

`uploads.json` there says which files have arrived, so that an interrupted export sends none twice.
"""

from __future__ import annotations

import logging

from pydantic import ConfigDict, TypeAdapter, ValidationError

from finetune_trainer.config import Base, Stage
from finetune_trainer.marker import stage_folder
from finetune_trainer.outcome import Artifact
from finetune_trainer.storage import FileInfo, Folder

UPLOADS = "uploads.json"

log = logging.getLogger(__name__)


class Staged(Base):
    """A file that has arrived."""

    model_config = ConfigDict(extra="ignore")

    artifact: Artifact
    etag: str
    """The store's, as in a listing; empty on disk."""


_Uploads = TypeAdapter(tuple[Staged, ...])


class Staging:
    """The staged files of one fingerprint; one thread at a time records."""

    def __init__(self, output: Folder, fingerprint: str) -> None:
        self._output = output
        self.base = stage_folder(Stage.EXPORT, fingerprint)
        self._files = {item.artifact.path: item for item in self._read()}

    def path(self, path: str) -> str:
        """Where a file waits, below the output folder."""
        return f"{self.base}/{path}"

    def holds(self, artifact: Artifact) -> bool:
        """Whether a file has arrived with this size and SHA-256, now or in an earlier attempt."""
        found = self._files.get(artifact.path)
        return found is not None and _content(found.artifact) == _content(artifact)

    def record(self, artifact: Artifact) -> None:
        """Remember that a file has arrived."""
        infos = self._output.list(self.path(artifact.path))
        etag = next(info.etag for info in infos if info.path == self.path(artifact.path))
        self._files[artifact.path] = Staged(artifact=artifact, etag=etag)
        data = _Uploads.dump_json(tuple(self._files.values()), indent=2)
        self._output.write(self.path(UPLOADS), data)

    def _read(self) -> list[Staged]:
        """What uploads.json lists and is still there, unchanged."""
        data = self._output.read(self.path(UPLOADS))
        if data is None:
            return []
        try:
            items = _Uploads.validate_json(data)
        except ValidationError:
            log.warning("%s is not of this version", self._output.uri_of(self.path(UPLOADS)))
            return []
        there = {info.path: info for info in self._output.list(f"{self.base}/")}
        return [item for item in items if self._is_there(item, there)]

    def _is_there(self, item: Staged, there: dict[str, FileInfo]) -> bool:
        info = there.get(self.path(item.artifact.path))
        return info is not None and (info.size, info.etag) == (item.artifact.bytes, item.etag)


def _content(artifact: Artifact) -> tuple[int, str]:
    return artifact.bytes, artifact.sha256
