"""What a folder can do, wherever it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from finetune_trainer.contract import Reason, StageError

OnBytes = Callable[[int], None]
"""Called with the number of bytes moved since the last call, from any thread."""


@dataclass(frozen=True)
class FileInfo:
    """A file of a folder."""

    path: str
    size: int
    etag: str
    """Changes with the content: the object's ETag, or `sha256:…` of a file on disk. Empty in the
    listing of a folder on disk, where it would mean reading everything."""


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

    def download_tree(self, prefix: str, target: Path, on_bytes: OnBytes | None = None) -> Path:
        """Copy every file below the folder `prefix` to `target`.

        Raises StageError, before anything is copied, where a file's name leads out of `target`.
        """
        files = {
            info.path: info.path.removeprefix(f"{prefix}/") for info in self.list(f"{prefix}/")
        }
        for path, below in files.items():
            if not stays_below(below):
                raise StageError(
                    Reason.INVALID_CONFIG,
                    f"{self.uri_of(path)} has a name that leads out of its folder, so nothing of "
                    f"{self.uri_of(prefix)} is downloaded: delete it, and look at who wrote it.",
                )
        for path, below in files.items():
            self.download(path, target / below, on_bytes)
        return target


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
