"""Files in a bucket or on disk, behind one small interface: Folder, below, and a folder on disk.

s3_folder   a prefix of a bucket
s3_client   a client for each store, and what its errors mean
marker      which stages' results are complete, reading them; whose an output folder is
versions    versions of the artifacts, which is current, and which go

`open_folder` takes an `s3://bucket/prefix` or the path of a folder. Errors of the store are turned
into `StageError` in here and nowhere else, with the URI and what to do about it, and never with a
credential.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from uuid import uuid4

from finetune_trainer.contract import Reason, StageError, Storage

OnBytes = Callable[[int], None]
"""Called with the number of bytes moved since the last call, from any thread."""


@dataclass(frozen=True)
class FileInfo:
    path: str
    size: int
    etag: str
    """Changes with the content: the object's ETag, or `sha256:…` of a file on disk. Empty in the
    listing of a folder on disk, where it would mean reading everything."""

    modified: float = field(default=0.0, compare=False)
    """In a listing: when it was written, in seconds since 1970 by the store's clock."""


class Folder(ABC):
    """A folder in a bucket or on disk; paths are relative to it and use `/`.

    Every method can raise StageError (access denied, no such bucket, store unreachable).
    """

    uri: str

    def uri_of(self, path: str) -> str:
        """The full name of a file, as a person would write it."""
        return f"{self.uri}/{path}" if path else self.uri

    @abstractmethod
    def stat(self, path: str) -> FileInfo | None:
        """Size and ETag; None when the file is not there."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[FileInfo]:
        """All files whose path starts with `prefix`, sorted by path."""

    @abstractmethod
    def read(self, path: str) -> bytes | None:
        """The content of a small file; None when it is not there."""

    @abstractmethod
    def read_start(self, path: str, count: int) -> bytes:
        """The first `count` bytes of a file, fewer where it is shorter.

        FileNotFoundError when it is missing.
        """

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Write a small file, as a whole or not at all."""

    @abstractmethod
    def create(self, path: str, data: bytes) -> bool:
        """Write a small file only where nothing is; returns whether this call wrote it.

        Of several callers at once one wins, on disk and in each store that knows If-None-Match. In
        another one it is the last that wrote, as far as each sees it.
        """

    @abstractmethod
    def download(self, path: str, target: Path, on_bytes: OnBytes | None = None) -> None:
        """Copy a file to disk, as a whole or not at all; FileNotFoundError when it is missing."""

    @abstractmethod
    def upload(
        self,
        source: Path,
        path: str,
        on_bytes: OnBytes | None = None,
        *,
        sha256: str | None = None,
    ) -> None:
        """Copy a file from disk, as a whole or not at all.

        With `sha256`, what the file had when it was finished, a file that has changed since is not
        copied (StageError). What `on_bytes` raises ends the upload.
        """

    @abstractmethod
    def abandon(self, prefix: str) -> None:
        """Drop what uploads below `prefix` left that were never finished."""

    @abstractmethod
    def delete(self, paths: Iterable[str]) -> None:
        """Delete files; one that is not there is no error."""


def stays_below(path: str) -> bool:
    """Whether the path of a file that somebody listed stays in the folder that it is below."""
    listed = PurePosixPath(path)
    return not listed.is_absolute() and ".." not in listed.parts


class ChangedFileError(StageError):
    """A file was altered on disk; the next attempt writes it anew."""

    def __init__(self, source: Path) -> None:
        super().__init__(
            Reason.INTERNAL_ERROR,
            f"{source.name} is not what was written: its bytes on the disk have changed since its "
            "SHA-256 was taken, so it is not uploaded. The stage can be tried again; should it "
            "happen once more, look at the disk and the memory of the node.",
        )


def check_sha256(source: Path, found: str, expected: str | None) -> None:
    """ChangedFileError when a file is not what it was when it was finished."""
    if expected is not None and found != expected:
        raise ChangedFileError(source)


# --- A folder on disk --------------------------------------------------------------------------

PARTIAL = ".partial-"  # begins the name of a file that is still being written
OLD_SECONDS = 24 * 3600
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


def remove_old_partials(folder: Path) -> None:
    """Remove what was begun here a day ago and more: its process is gone, and nobody else would."""
    for file in folder.rglob(f"{PARTIAL}*"):
        with suppress(FileNotFoundError):
            if time.time() - file.stat().st_mtime > OLD_SECONDS:
                file.unlink()


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
                    found = file.stat()
                    infos.append(FileInfo(path, found.st_size, "", found.st_mtime))
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


# --- Either --------------------------------------------------------------------------------------


def open_folder(uri: str, settings: Storage) -> Folder:
    """The folder that a URI names; nothing is checked or created yet."""
    if not uri.startswith("s3://"):
        return LocalFolder(Path(uri))
    from finetune_trainer.store.s3_folder import S3Folder  # noqa: PLC0415 - boto3 takes half a second

    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise StageError(Reason.INVALID_CONFIG, f"{uri!r} names no bucket: write s3://bucket/key.")
    return S3Folder(bucket, prefix.strip("/"), settings)


def split(uri: str) -> tuple[str, str]:
    """Split the URI of a file into the URI of its folder and its name."""
    if not uri.startswith("s3://"):
        return str(Path(uri).parent), Path(uri).name
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    parent, _, name = key.rpartition("/")
    return f"s3://{bucket}/{parent}".rstrip("/"), name
