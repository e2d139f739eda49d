"""A folder on disk, e.g. a mounted volume."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.store.folder import FileInfo, Folder, OnBytes, check_sha256

PARTIAL = ".partial-"  # begins the name of a file that is still being written
_CHUNK = 4 << 20
# What a file system says that has no hard links, or no more of them for this file.
_NO_LINKS = {errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV}
# What a file system says that can't sync, for example a folder of a network share.
_NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF}
_DENIED = {
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


@contextmanager
def partial_file(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to, gone in the end."""
    _make_folder(target.parent)
    partial = target.with_name(f"{PARTIAL}{uuid4().hex[:8]}-{target.name}"[:255])
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, each name on the disk."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


@contextmanager
def replacing(target: Path, *, lasting: bool = False) -> Iterator[Path]:
    """A path beside `target` to write to; it takes the target's place when all went well.

    Where it is `lasting`, bytes and name are on the disk in the end: what is written later, such as
    a marker, outlives no file that it speaks of, also where the machine itself fails.
    """
    with partial_file(target) as partial:
        yield partial
        if lasting:
            sync(partial)
        os.replace(partial, target)  # noqa: PTH105 - says that it overwrites
        if lasting:
            sync(target.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


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
        """Walk the folder that `prefix` names, or the one that it lies in."""
        base = self.root / prefix.rpartition("/")[0]
        infos = []
        with self._errors(prefix):
            for file in base.rglob("*"):
                path = file.relative_to(self.root).as_posix()
                if path.startswith(prefix) and file.is_file() and PARTIAL not in file.name:
                    infos.append(FileInfo(path, file.stat().st_size, ""))
        return sorted(infos, key=lambda info: info.path)

    def read(self, path: str) -> bytes | None:
        with self._errors(path):
            try:
                return (self.root / path).read_bytes()
            except FileNotFoundError:
                return None

    def read_start(self, path: str, count: int) -> bytes:
        with self._errors(path), (self.root / path).open("rb") as stream:
            return stream.read(count)

    def write(self, path: str, data: bytes) -> None:
        """Write beside the target and rename."""
        with self._errors(path), replacing(self.root / path, lasting=True) as partial:
            partial.write_bytes(data)

    def create(self, path: str, data: bytes) -> bool:
        """Write beside the target and link it there, which never replaces a file."""
        target = self.root / path
        with self._errors(path), partial_file(target) as partial:
            partial.write_bytes(data)
            sync(partial)
            try:
                target.hardlink_to(partial)
                sync(target.parent)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return _create_in_place(target, data)
        return True

    def download(self, path: str, target: Path, on_bytes: OnBytes | None = None) -> None:
        with self._errors(path):
            _copy(self.root / path, target, on_bytes)

    def upload(
        self,
        source: Path,
        path: str,
        on_bytes: OnBytes | None = None,
        *,
        sha256: str | None = None,
    ) -> None:
        with self._errors(path):
            _copy(source, self.root / path, on_bytes, sha256, lasting=True)

    def abandon(self, prefix: str) -> None:
        base = self.root / prefix.rpartition("/")[0]
        with self._errors(prefix):
            for file in list(base.rglob(f"{PARTIAL}*")):
                if file.relative_to(self.root).as_posix().startswith(prefix):
                    file.unlink(missing_ok=True)
                    self._remove_empty(file)

    def delete(self, paths: Iterable[str]) -> None:
        """Delete files, and the folders that this leaves empty."""
        for path in paths:
            with self._errors(path):
                file = self.root / path
                file.unlink(missing_ok=True)
                self._remove_empty(file)

    def _remove_empty(self, file: Path) -> None:
        """Remove the folders above a file that is gone, as far as they are empty."""
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


def _create_in_place(target: Path, data: bytes) -> bool:
    """For a file system without hard links: a reader may meet a part of the file."""
    try:
        with target.open("xb") as write:
            write.write(data)
    except FileExistsError:
        return False
    sync(target)
    sync(target.parent)
    return True


def _copy(
    source: Path,
    target: Path,
    on_bytes: OnBytes | None,
    sha256: str | None = None,
    *,
    lasting: bool = False,
) -> None:
    digest = hashlib.sha256()
    with source.open("rb") as read, replacing(target, lasting=lasting) as partial:
        with partial.open("wb") as write:
            while chunk := read.read(_CHUNK):
                write.write(chunk)
                if sha256:
                    digest.update(chunk)
                if on_bytes:
                    on_bytes(len(chunk))
        if sha256:
            check_sha256(source, digest.hexdigest(), sha256)
