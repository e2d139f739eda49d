"""From finished files to an output folder that readers can rely on.

Publication, below, uploads the files of a new version in the background, into its own folder, and
makes it the current one. The former version stays whole and current until manifest.json names the
new one.

signing   signs them
hub_push  pushes those that others may read to the Hugging Face Hub
oci_push  pushes the models to a container registry
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Self

from pydantic import ConfigDict, TypeAdapter, ValidationError

from finetune_trainer.contract import (
    Artifact,
    Base,
    Quality,
    Reason,
    Stage,
    StageError,
    version_folder,
)
from finetune_trainer.runtime import Transfer, size
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import FileInfo, Folder
from finetune_trainer.store.marker import (
    STAGES,
    describe_file,
    stage_folder,
)
from finetune_trainer.store.versions import (
    Version,
    discard_unfinished,
    find_version,
    make_current,
    manifest_path,
    missing,
    new_version,
    version_name,
    withdraw,
)

SHA256SUMS = "SHA256SUMS"
UPLOADS = "uploads.json"

Files = tuple[Artifact, ...]
Build = Callable[[Files], bytes]
"""Makes manifest.json of all files."""

Sign = Callable[[Files], dict[str, bytes]]
"""Makes the files of a signature of all others, by path."""

PROVENANCE = "provenance.json"
"""The manifest without the signature, so that it can be signed; only where something is signed."""

log = logging.getLogger(__name__)


class Uploaded(Base):
    """A file that has arrived."""

    model_config = ConfigDict(extra="ignore")

    artifact: Artifact
    etag: str
    """The store's, as in a listing; empty on disk."""


_UPLOADS = TypeAdapter(tuple[Uploaded, ...])


class UploadRecord:
    """The uploaded files of one version that is being made; one thread at a time records.

    It lies outside the version's folder, which holds what the manifest lists and nothing else.
    """

    def __init__(self, output: Folder, fingerprint: str) -> None:
        self._output = output
        self._folder = version_folder(version_name(fingerprint))
        self._file = f"{stage_folder(Stage.EXPORT, fingerprint)}/{UPLOADS}"
        self._files = {item.artifact.path: item for item in self._read()}

    def path(self, path: str) -> str:
        """Where a file of the version is, below the output folder."""
        return f"{self._folder}/{path}"

    def holds(self, artifact: Artifact) -> bool:
        """Whether a file has arrived with this size and SHA-256, now or in an earlier attempt."""
        found = self._files.get(artifact.path)
        return found is not None and _content(found.artifact) == _content(artifact)

    def find(self, path: str) -> Artifact | None:
        """A file that has arrived."""
        found = self._files.get(path)
        return found.artifact if found else None

    def add(self, artifact: Artifact) -> None:
        """Remember that a file has arrived."""
        infos = self._output.list(self.path(artifact.path))
        etag = next(info.etag for info in infos if info.path == self.path(artifact.path))
        self._files[artifact.path] = Uploaded(artifact=artifact, etag=etag)
        data = _UPLOADS.dump_json(tuple(self._files.values()), indent=2)
        self._output.write(self._file, data)

    def _read(self) -> list[Uploaded]:
        """What uploads.json lists and is still there, unchanged."""
        data = self._output.read(self._file)
        if data is None:
            return []
        try:
            items = _UPLOADS.validate_json(data)
        except ValidationError:
            log.warning("%s is not of this version", self._output.uri_of(self._file))
            return []
        there = {info.path: info for info in self._output.list(f"{self._folder}/")}
        return [item for item in items if self._is_there(item, there)]

    def _is_there(self, item: Uploaded, there: dict[str, FileInfo]) -> bool:
        info = there.get(self.path(item.artifact.path))
        return info is not None and (info.size, info.etag) == (item.artifact.bytes, item.etag)


def _content(artifact: Artifact) -> tuple[int, str]:
    return artifact.bytes, artifact.sha256


class ClosedError(Exception):
    """The publication was closed while a file was on its way."""


class Publication:
    """One version that is being made.

    A failed upload is raised (StageError, OSError) by the next call of any method but `close`.
    Nothing is published before `commit`. If it is closed before, the next Publication of the same
    fingerprint takes over what was uploaded. A version of this fingerprint that is no longer whole
    is none from now on.
    """

    def __init__(self, output: Folder, fingerprint: str, reporter: Reporter) -> None:
        self._output = output
        self._fingerprint = fingerprint
        self._reporter = reporter
        withdraw(output, fingerprint)
        # What a killed attempt was writing, beside the files that it had finished.
        output.abandon(f"{version_folder(version_name(fingerprint))}/")
        self._record = UploadRecord(output, fingerprint)
        self._files: dict[str, Artifact] = {}
        self._queue: SimpleQueue[tuple[Path, Artifact] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = 0  # bytes that are still to be sent
        self._needed: set[Path] = set()  # files that are still to be sent
        self._unneeded: set[Path] = set()
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
        """Upload a finished file, in the background; it must stay as it is until `commit` or
        `discard`.

        `path` is its name in the version's folder. What an earlier attempt has uploaded is not sent
        again.
        """
        self._raise_failure()
        artifact = describe_file(file, path).model_copy(update={"quality": quality})
        self._files[path] = artifact
        if self._record.holds(artifact):
            log.info("%s was uploaded by an earlier attempt", path)
            return artifact
        with self._lock:
            self._waiting += artifact.bytes
            self._needed.add(file)
        self._queue.put((file, artifact))
        return artifact

    def find(self, path: str) -> Artifact | None:
        """A file that an earlier attempt has uploaded, as it was then."""
        return self._record.find(path)

    def take(self, artifact: Artifact) -> None:
        """Let a file that was found be one of this version, without it being here."""
        self._files[artifact.path] = artifact

    def fetch(self, artifact: Artifact, target: Path) -> Path:
        """Bring a file that was found to disk; returns `target`. StageError if it changed."""
        moved = self._reporter.transfer(f"Fetching {target.name}", artifact.bytes)
        place = self._record.path(artifact.path)
        self._output.download(place, target, moved)
        if describe_file(target, artifact.path).sha256 != artifact.sha256:
            raise StageError(
                Reason.STORED_FILE_CHANGED,
                f"{self._output.uri_of(place)} is not the file that was uploaded: somebody has "
                "replaced it, or the store has damaged it. Delete it: it is made again.",
            )
        return target

    def discard(self, file: Path) -> None:
        """Delete a file that nobody reads any more, as soon as it has been sent."""
        with self._lock:
            self._unneeded.add(file)
            if file not in self._needed:
                file.unlink(missing_ok=True)

    def commit(self, build: Build, sign: Sign | None = None) -> Published:
        """Wait for the uploads, add SHA256SUMS and the signature, and publish all of it."""
        self._finish_uploads()
        self._write(SHA256SUMS, sha256sums(self.artifacts))
        if sign:
            self._write(PROVENANCE, build(self.artifacts))
            for path, data in sign(self.artifacts).items():
                self._write(path, data)
        manifest = build(self.artifacts)
        self._reporter.message("Publishing the new version")
        self._remove_others()
        version = new_version(self._fingerprint, manifest)
        if lost := missing(self._output, version):
            raise StageError(
                Reason.STORAGE_UNAVAILABLE,
                f"{self._output.uri_of(lost[0])} is not there, or not whole, although the store "
                "has confirmed it: look at the store's own log. The next attempt sends it again.",
            )
        self._output.write(manifest_path(version.name), manifest)
        return _make_current_and_clean(self._output, version)

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
        with self._reporter.part("upload"):
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
        self._output.write(self._record.path(path), data)

    def _remove_others(self) -> None:
        """Delete what an earlier attempt put into the folder and this one did not."""
        mine = {self._record.path(path) for path in self._files}
        there = [info.path for info in self._output.list(self._record.path(""))]
        self._output.delete(path for path in there if path not in mine)

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
        target = self._record.path(artifact.path)
        self._output.upload(file, target, self._count, sha256=artifact.sha256)
        self._record.add(artifact)
        with self._lock:
            self._needed.discard(file)
            if file in self._unneeded:
                file.unlink(missing_ok=True)
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


@dataclass(frozen=True)
class Published:
    """A version that stands, and the one that manifest.json names."""

    version: Version
    current: Version


def finish(output: Folder, fingerprint: str) -> Published | None:
    """Make the version of this fingerprint the current one, if it is there as a whole.

    What earlier attempts, and exports that were given up, have left is deleted.
    """
    version = find_version(output, fingerprint)
    return _make_current_and_clean(output, version) if version else None


def _make_current_and_clean(output: Folder, version: Version) -> Published:
    now = make_current(output, version)
    discard_unfinished(output)
    output.delete(info.path for info in output.list(f"{STAGES}/{Stage.EXPORT}/"))
    return Published(version, now)
