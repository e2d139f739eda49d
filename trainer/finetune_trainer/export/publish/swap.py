"""A new version waits until it is whole, then takes the place of the former one."""

from __future__ import annotations

import json
import logging
from pathlib import PurePosixPath

from pydantic import ConfigDict, TypeAdapter, ValidationError

from finetune_trainer.contract import Artifact, Base, Reason, Stage, StageError
from finetune_trainer.store import FileInfo, Folder
from finetune_trainer.store.marker import (
    MANIFEST,
    STAGES,
    Marker,
    find_complete,
    missing_files,
    stage_folder,
    stays_below,
)

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


FORMER = "manifest.former.json"
"""The manifest that is being replaced, with the files of all versions before the new one."""

RECORD = "commit.json"
_STAGED = f"{STAGES}/{Stage.EXPORT}/"


def swap(output: Folder, fingerprint: str, manifest: bytes) -> None:
    """Publish what is staged for a fingerprint; `manifest` is a Marker of exactly these files.

    Raises StageError or FileNotFoundError; it may be repeated from the start at any point.
    """
    base = stage_folder(Stage.EXPORT, fingerprint)
    marker = Marker.model_validate_json(manifest)
    files = {item.path for item in marker.files}
    former = former_files(output)
    output.write(f"{base}/{RECORD}", manifest)
    _set_aside(output, former)
    for path in sorted(files):
        output.copy(f"{base}/{path}", path)
    _check(output, marker)
    output.delete(sorted(former.keys() - files))
    output.write(MANIFEST, manifest)
    _clean_up(output, base)


def finish_interrupted(output: Folder, fingerprint: str) -> bytes | None:
    """Finish the swap of an earlier attempt, where it is not finished.

    Returns the manifest of what earlier attempts published, None where nothing (whole) is.
    """
    base = stage_folder(Stage.EXPORT, fingerprint)
    manifest = output.read(f"{base}/{RECORD}")
    marker = _parse(manifest)
    if manifest is None or marker is None:
        found = find_complete(output, Stage.EXPORT, fingerprint)
        return output.read(MANIFEST) if found else None
    if output.read(MANIFEST) == manifest:
        _clean_up(output, base)
    elif missing_files(output, marker, base):
        return None
    else:
        swap(output, fingerprint, manifest)
    return manifest


def former_files(output: Folder) -> dict[str, Artifact]:
    """Files that earlier versions left under their names, also of swaps that were interrupted."""
    records = [info.path for info in output.list(_STAGED) if info.path.endswith(f"/{RECORD}")]
    found: dict[str, Artifact] = {}
    for path in (*records, FORMER, MANIFEST):
        if marker := _parse(output.read(path)):
            found |= {item.path: item for item in marker.files if _may_go(item.path)}
    return found


def _set_aside(output: Folder, former: dict[str, Artifact]) -> None:
    old = output.read(MANIFEST)
    if old is None:
        return
    if _parse(old):  # else it is not ours, and is kept as it is
        files = [item.model_dump(mode="json", exclude_none=True) for item in former.values()]
        old = json.dumps({**json.loads(old), "files": files}, indent=2).encode()
    output.write(FORMER, old)
    output.delete([MANIFEST])


def _check(output: Folder, marker: Marker) -> None:
    if missing := missing_files(output, marker, ""):
        raise StageError(
            Reason.STORAGE_UNAVAILABLE,
            f"{output.uri_of(missing[0])} is not there, or not whole, after the store was told to "
            "copy it: look at the store's own log.",
        )


def _clean_up(output: Folder, base: str) -> None:
    record = f"{base}/{RECORD}"
    output.abandon(_STAGED)
    output.delete(info.path for info in output.list(_STAGED) if info.path != record)
    output.delete([FORMER])
    output.delete([record])


def _parse(data: bytes | None) -> Marker | None:
    try:
        return Marker.model_validate_json(data) if data else None
    except ValidationError:
        return None


def _may_go(path: str) -> bool:
    """Whether a path stays in the output folder, and out of what belongs to the stages."""
    return stays_below(path) and PurePosixPath(path).parts[:1] != (STAGES,)
