"""A folder on disk, e.g. a mounted volume."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from finetune_trainer.outcome import Reason, StageError
from finetune_trainer.storage.folder import FileInfo, Folder, OnBytes

PARTIAL = ".partial-"  # begins the name of a file that is still being written
_CHUNK = 4 << 20
_DENIED = {
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to; it takes the target's place when all went well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{PARTIAL}{uuid4().hex[:8]}-{target.name}"[:255])
    try:
        yield partial
        os.replace(partial, target)  # noqa: PTH105 - says that it overwrites
    finally:
        partial.unlink(missing_ok=True)


class LocalFolder(Folder):
    """A folder on disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = str(root)

    def stat(self, path: str) -> FileInfo | None:
        """Read the whole file for its SHA-256."""
        file = self.root / path
        with self._errors(path):
            if not file.is_file():
                return None
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            return FileInfo(path, file.stat().st_size, f"sha256:{digest}")

    def list(self, prefix: str = "") -> list[FileInfo]:
        """Walk the folder that `prefix` names or lies in."""
        base = self.root / prefix.rpartition("/")[0]
        infos = []
        with self._errors(prefix):
            for file in base.rglob("*"):
                path = file.relative_to(self.root).as_posix()
                if path.startswith(prefix) and file.is_file() and PARTIAL not in file.name:
                    infos.append(FileInfo(path, file.stat().st_size, ""))
        return sorted(infos, key=lambda info: info.path)

    def read(self, path: str) -> bytes | None:
        """Read a file."""
        with self._errors(path):
            try:
                return (self.root / path).read_bytes()
            except FileNotFoundError:
                return None

    def write(self, path: str, data: bytes) -> None:
        """Write beside the target and rename."""
        with self._errors(path), replacing(self.root / path) as partial:
            partial.write_bytes(data)

    def download(self, path: str, target: Path, on_bytes: OnBytes | None = None) -> None:
        """Copy from the folder."""
        with self._errors(path):
            _copy(self.root / path, target, on_bytes)

    def upload(self, source: Path, path: str, on_bytes: OnBytes | None = None) -> None:
        """Copy into the folder."""
        with self._errors(path):
            _copy(source, self.root / path, on_bytes)

    def delete(self, paths: Iterable[str]) -> None:
        """Delete files, and the folders that this leaves empty."""
        for path in paths:
            with self._errors(path):
                file = self.root / path
                file.unlink(missing_ok=True)
                for parent in file.parents:
                    if parent == self.root or not parent.is_dir() or any(parent.iterdir()):
                        break
                    parent.rmdir()

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """A full disk and a missing file stay OSErrors: the caller knows what they mean."""
        try:
            yield
        except OSError as error:
            if error.errno not in _DENIED:
                raise
            raise StageError(
                Reason.STORAGE_ACCESS_DENIED,
                f"{self.uri_of(path)} can't be accessed: {error.strerror}. Mount the folder with "
                "the rights that the trainer's user needs.",
            ) from error


def _copy(source: Path, target: Path, on_bytes: OnBytes | None) -> None:
    with source.open("rb") as read, replacing(target) as partial, partial.open("wb") as write:
        while chunk := read.read(_CHUNK):
            write.write(chunk)
            if on_bytes:
                on_bytes(len(chunk))
