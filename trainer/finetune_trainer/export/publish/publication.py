"""A new version of the output folder: uploaded in the background, published at once."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import SimpleQueue
from typing import Self

from finetune_trainer.contract import Artifact, Quality
from finetune_trainer.export.publish.swap import Staging, swap
from finetune_trainer.runtime.progress import Reporter, Transfer
from finetune_trainer.runtime.units import size
from finetune_trainer.store import Folder
from finetune_trainer.store.marker import describe_file

SHA256SUMS = "SHA256SUMS"


def sha256sums(artifacts: Iterable[Artifact]) -> bytes:
    """One line for each file, sorted by path."""
    return "".join(sorted((_line(item) for item in artifacts), key=_path)).encode()


def _line(item: Artifact) -> str:
    """Two spaces mean text mode, which is the same as binary mode on Linux and macOS."""
    escaped = item.path.replace("\\", "\\\\").replace("\n", "\\n")
    return f"{'' if escaped == item.path else chr(92)}{item.sha256}  {escaped}\n"


def _path(line: str) -> str:
    return line.partition("  ")[2]


Files = tuple[Artifact, ...]
Build = Callable[[Files], bytes]
"""Makes manifest.json of all files."""

Sign = Callable[[Files], dict[str, bytes]]
"""Makes the files of a signature of all others, by path."""

PROVENANCE = "provenance.json"
"""The manifest without the signature, so that it can be signed; only where something is signed."""

log = logging.getLogger(__name__)


class ClosedError(Exception):
    """The publication was closed while a file was on its way."""


class Publication:
    """One version of the output folder.

    A failed upload is raised (StageError, OSError) by the next call of any method but `close`.
    Nothing is published before `commit`. A Publication that is closed before leaves what it has
    uploaded to the next one of the same fingerprint.
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
        """The thread runs already."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the background work."""
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
