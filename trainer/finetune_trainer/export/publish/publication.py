"""A new version of the output folder: uploaded in the background, published at once.

Its files wait in a folder of their own until they are whole. Then the new version takes the place
of the former one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from queue import SimpleQueue
from typing import Self

from pydantic import ConfigDict, TypeAdapter, ValidationError

from finetune_trainer.contract import Artifact, Base, Quality, Reason, Stage, StageError
from finetune_trainer.runtime.reporter import Reporter, Transfer
from finetune_trainer.runtime.units import size
from finetune_trainer.store import FileInfo, Folder, stays_below
from finetune_trainer.store.marker import (
    MANIFEST,
    STAGES,
    Marker,
    describe_file,
    find_complete,
    missing_files,
    stage_folder,
)

SHA256SUMS = "SHA256SUMS"
UPLOADS = "uploads.json"

FORMER = "manifest.former.json"
"""The manifest that is being replaced, with the files of all versions before the new one."""

RECORD = "commit.json"
_STAGED = f"{STAGES}/{Stage.EXPORT}/"

Files = tuple[Artifact, ...]
Build = Callable[[Files], bytes]
"""Makes manifest.json of all files."""

Sign = Callable[[Files], dict[str, bytes]]
"""Makes the files of a signature of all others, by path."""

PROVENANCE = "provenance.json"
"""The manifest without the signature, so that it can be signed; only where something is signed."""

log = logging.getLogger(__name__)


class Staged(Base):
    """A file that has arrived."""

    model_config = ConfigDict(extra="ignore")

    artifact: Artifact
    etag: str
    """The store's, as in a listing; empty on disk."""


_UPLOADS = TypeAdapter(tuple[Staged, ...])


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
        data = _UPLOADS.dump_json(tuple(self._files.values()), indent=2)
        self._output.write(self.path(UPLOADS), data)

    def _read(self) -> list[Staged]:
        """What uploads.json lists and is still there, unchanged."""
        data = self._output.read(self.path(UPLOADS))
        if data is None:
            return []
        try:
            items = _UPLOADS.validate_json(data)
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


class ClosedError(Exception):
    """The publication was closed while a file was on its way."""


class Publication:
    """One version of the output folder.

    A failed upload is raised (StageError, OSError) by the next call of any method but `close`.
    Nothing is published before `commit`. If it is closed before, the next Publication of the same
    fingerprint takes over what was uploaded.
    """

    def __init__(self, output: Folder, fingerprint: str, reporter: Reporter) -> None:
        self._output = output
        self._fingerprint = fingerprint
        self._reporter = reporter
        self._staging = Staging(output, fingerprint)
        self._files: dict[str, Artifact] = {}
        self._queue: SimpleQueue[tuple[Path, Artifact] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = 0  # bytes that are still to be sent
        self._transfer: Transfer | None = None
        self._failure: Exception | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="uploads", daemon=True)
        self._thread.start()

    @property
    def artifacts(self) -> Files:
        """What was added so far, in this order."""
        return tuple(self._files.values())

    def add(self, file: Path, path: str, quality: Quality | None = None) -> Artifact:
        """Upload a finished file, in the background; it must stay as it is until `commit`.

        `path` is its name in the output folder. What an earlier attempt has uploaded is not sent
        again.
        """
        self._raise_failure()
        artifact = describe_file(file, path).model_copy(update={"quality": quality})
        self._files[path] = artifact
        if self._staging.holds(artifact):
            log.info("%s was uploaded by an earlier attempt", path)
            return artifact
        with self._lock:
            self._waiting += artifact.bytes
        self._queue.put((file, artifact))
        return artifact

    def commit(self, build: Build, sign: Sign | None = None) -> Files:
        """Wait for the uploads, add SHA256SUMS and the signature, and publish all of it.

        Returns the files that the manifest lists.
        """
        self._finish_uploads()
        self._write(SHA256SUMS, sha256sums(self.artifacts))
        if sign:
            self._write(PROVENANCE, build(self.artifacts))
            for path, data in sign(self.artifacts).items():
                self._write(path, data)
        manifest = build(self.artifacts)
        self._reporter.message("Publishing the new version")
        swap(self._output, self._fingerprint, manifest)
        return self.artifacts

    def close(self) -> None:
        """End the background work; a file on its way is left to a later attempt."""
        self._closing.set()
        self._queue.put(None)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _finish_uploads(self) -> None:
        with self._lock:
            if self._waiting:
                what = "Uploading what is left"
                self._transfer = self._reporter.transfer(what, self._waiting)
        self._queue.put(None)
        self._thread.join()
        self._raise_failure()

    def _write(self, path: str, data: bytes) -> None:
        artifact = Artifact(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        self._files[path] = artifact
        self._output.write(self._staging.path(path), data)

    def _loop(self) -> None:
        while (item := self._queue.get()) and not self._closing.is_set():
            try:
                self._upload(*item)
            except ClosedError:
                return
            except Exception as error:  # raised again by the next call
                self._failure = error
                return

    def _upload(self, file: Path, artifact: Artifact) -> None:
        target = self._staging.path(artifact.path)
        self._output.upload(file, target, self._count, sha256=artifact.sha256)
        self._staging.record(artifact)
        log.info("Uploaded %s (%s)", artifact.path, size(artifact.bytes))

    def _count(self, count: int) -> None:
        if self._closing.is_set():
            raise ClosedError
        with self._lock:
            self._waiting -= count
            transfer = self._transfer
        if transfer:
            transfer(count)

    def _raise_failure(self) -> None:
        if self._failure:
            raise self._failure


def sha256sums(artifacts: Iterable[Artifact]) -> bytes:
    """One line for each file, sorted by path, as sha256sum(1) reads them."""
    lines = []
    for item in artifacts:
        escaped = item.path.replace("\\", "\\\\").replace("\n", "\\n")
        mark = "" if escaped == item.path else "\\"
        # Two spaces mean text mode, which is the same as binary mode on Linux and macOS.
        lines.append(f"{mark}{item.sha256}  {escaped}\n")
    return "".join(sorted(lines, key=lambda line: line.partition("  ")[2])).encode()


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
    """Whether a path is in the output folder, and not in the stages' part of it."""
    return stays_below(path) and PurePosixPath(path).parts[:1] != (STAGES,)
