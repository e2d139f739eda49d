"""Uploads to S3: boto3's transfer manager, and what it leaves to its caller.

It sends parts in parallel, repeats each by botocore's own retries, and aborts the whole when one
fails for good. The client adds Content-MD5 to each request (s3_client). What is added here: the
file is hashed as it is read, so that the bytes that are sent are those that have the SHA-256; and
what a killed process began is dropped before the same object is uploaded again.
"""

from __future__ import annotations

import hashlib
import logging
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn, cast
from uuid import uuid4

from botocore.exceptions import ClientError
from s3transfer.manager import TransferConfig, TransferManager
from s3transfer.subscribers import BaseSubscriber

from finetune_trainer.store.folder import ChangedFileError, OnBytes, check_sha256
from finetune_trainer.store.s3_client import error_code

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PART_BYTES = 8 << 20
"""Smallest part, and the largest file that goes in one piece; larger where a file would have more
than 10,000 parts, S3's limit. S3 wants at least 5 MiB."""

THREADS = 4  # each with a part in memory
_UPLOAD_NAME = "upload"  # of the metadata by which an upload knows its object

_NO_UPLOAD = ("404", "NoSuchKey", "NoSuchUpload")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class S3Object:
    """An object, existing or not."""

    s3: S3Client
    bucket: str
    key: str


def upload(target: S3Object, source: Path, on_bytes: OnBytes | None, sha256: str | None) -> None:
    """Upload a file; the object appears as a whole, or not at all.

    `on_bytes` hears of what was sent, and whatever it raises ends the upload. Raises StageError
    when the file is not the one of `sha256`, else botocore's errors.
    """
    s3, bucket, key = target.s3, target.bucket, target.key
    size = source.stat().st_size
    if size <= PART_BYTES:
        data = source.read_bytes()
        check_sha256(source, hashlib.sha256(data).hexdigest(), sha256)
        s3.put_object(Bucket=bucket, Key=key, Body=data)
        if on_bytes:
            on_bytes(size)
        return
    abort(s3, bucket, key, exactly=True)
    config = TransferConfig(
        multipart_threshold=PART_BYTES,
        multipart_chunksize=PART_BYTES,
        max_request_concurrency=THREADS,
        max_in_memory_upload_chunks=THREADS,
    )
    name = uuid4().hex
    with source.open("rb") as stream, TransferManager(s3, config) as manager:
        body = CheckedUpload(source, stream, size, on_bytes, sha256)
        metadata = {"Metadata": {_UPLOAD_NAME: name}}
        future = manager.upload(cast("IO[Any]", body), bucket, key, metadata, [body])
        try:
            future.result()
        except CancelledError:
            if body.failure:
                raise body.failure from None
            raise
        except ClientError as error:
            # It is over already where the answer to an earlier attempt was lost.
            if error_code(error) not in _NO_UPLOAD or not _is_there(target, name):
                raise


class CheckedUpload(BaseSubscriber):
    """The file for the transfer manager, which reads it part by part and in order.

    A CancelledError ends the transfer at once, where botocore would repeat the request after any
    other error; `failure` keeps the cause.
    """

    def __init__(
        self,
        source: Path,
        stream: IO[bytes],
        size: int,
        on_bytes: OnBytes | None,
        sha256: str | None,
    ) -> None:
        super().__init__()
        self.failure: BaseException | None = None
        self._source, self._stream, self._size = source, stream, size
        self._on_bytes, self._sha256 = on_bytes, sha256
        self._digest = hashlib.sha256()
        self.tell, self.seek = stream.tell, stream.seek

    def seekable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        """A part; the last one only when the whole was what it should be."""
        data = self._stream.read(count)
        self._digest.update(data)
        if len(data) < count or self._stream.tell() >= self._size:
            found = self._digest.hexdigest()
            if self._stream.tell() != self._size or found != (self._sha256 or found):
                self._end(ChangedFileError(self._source))
        return data

    def on_progress(self, future: object, bytes_transferred: int, **_: object) -> None:  # noqa: ARG002
        try:
            if self._on_bytes:
                self._on_bytes(bytes_transferred)
        except BaseException as error:
            self._end(error)

    def _end(self, error: BaseException) -> NoReturn:
        self.failure = self.failure or error
        raise CancelledError


def abort(s3: S3Client, bucket: str, prefix: str, *, exactly: bool = False) -> None:
    """Drop unfinished uploads of all keys below a prefix, or of just this key."""
    pages = s3.get_paginator("list_multipart_uploads")
    try:
        found = [
            (item["Key"], item["UploadId"])
            for page in pages.paginate(Bucket=bucket, Prefix=prefix)
            for item in page.get("Uploads", [])
        ]
    except ClientError as error:  # the credentials may not list them
        log.info("Unfinished uploads can't be looked for (%s)", error_code(error))
        return
    for key, upload_id in found:
        if exactly and key != prefix:
            continue
        try:
            s3.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
        except ClientError as error:
            if error_code(error) not in _NO_UPLOAD:
                log.warning("%s: an unfinished upload stays (%s)", key, error_code(error))


def _is_there(target: S3Object, name: str) -> bool:
    """Whether the object is that of the upload with this name."""
    try:
        head = target.s3.head_object(Bucket=target.bucket, Key=target.key)
    except ClientError:
        return False
    return head["Metadata"].get(_UPLOAD_NAME) == name
