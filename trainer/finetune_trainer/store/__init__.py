"""Files in a bucket or on disk, behind one small interface.

`open_folder` takes an `s3://bucket/prefix` or the path of a folder. Errors of the store are turned
into `StageError` in here and nowhere else, with the URI and what to do about it, and never with a
credential.
"""

from __future__ import annotations

from pathlib import Path

from finetune_trainer.contract import Reason, StageError, Storage
from finetune_trainer.store.folder import FileInfo, Folder, LocalFolder, OnBytes, stays_below

__all__ = ["FileInfo", "Folder", "LocalFolder", "OnBytes", "open_folder", "split", "stays_below"]


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
