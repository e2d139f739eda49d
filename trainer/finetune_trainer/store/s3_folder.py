"""A prefix of a bucket, in Amazon S3 or a store that speaks its protocol.

Large files go through boto3's transfer manager. It sends parts in parallel, repeats each by
botocore's own retries, and aborts the whole when one fails for good. The client adds Content-MD5 to
each request (s3_client). What is added here: the file is hashed as it is read, so that the bytes
that are sent are those that have the SHA-256; and what a killed process began is dropped before the
same object is uploaded again.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn, cast
from uuid import uuid4

import boto3
from botocore.exceptions import BotoCoreError, ClientError
from s3transfer.manager import TransferConfig, TransferManager
from s3transfer.subscribers import BaseSubscriber

from finetune_trainer.contract import Storage
from finetune_trainer.store import (
    ChangedFileError,
    FileInfo,
    Folder,
    OnBytes,
    check_sha256,
    replacing,
)
from finetune_trainer.store.s3_client import (
    client,
    error_code,
    find_address,
    stage_error,
    token_error,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

CREATE_ATTEMPTS = 6  # while another writer of the same key is at it
CONFLICT_SECONDS = 0.2
_CONFLICT = {"409", "ConditionalRequestConflict", "OperationAborted"}
_THERE_ALREADY = {"412", "PreconditionFailed"}
_UNKNOWN_HEADER = {"501", "NotImplemented"}
_DELETE_AT_ONCE = 1000  # the most keys that one DeleteObjects takes

PART_BYTES = 8 << 20
"""Smallest part, and the largest file that goes in one piece; larger where a file would have more
than 10,000 parts, S3's limit. S3 wants at least 5 MiB."""

THREADS = 4  # each with a part in memory
_UPLOAD_NAME = "upload"  # of the metadata by which an upload knows its object

_NO_UPLOAD = ("404", "NoSuchKey", "NoSuchUpload")

log = logging.getLogger(__name__)


class S3Folder(Folder):
    def __init__(self, bucket: str, prefix: str, settings: Storage) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._address = find_address(settings)
        with self._errors(""):
            self._s3 = client(self._address)

    def stat(self, path: str) -> FileInfo | None:
        """HEAD. Its answer has no body when it fails, so a listing then says what is wrong."""
        with self._errors(path):
            try:
                head = self._s3.head_object(Bucket=self.bucket, Key=self._key(path))
            except ClientError as error:
                if error_code(error) in ("404", "NoSuchKey"):
                    self._probe(path)
                    return None
                if error_code(error) in ("400", "403"):
                    self._probe(path)
                raise
        return FileInfo(path, head["ContentLength"], head["ETag"].strip('"'))

    def list(self, prefix: str = "") -> list[FileInfo]:
        base = f"{self.prefix}/" if self.prefix else ""
        found = []
        with self._errors(prefix):
            pages = self._s3.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=base + prefix):
                for item in page.get("Contents", []):
                    path = item["Key"].removeprefix(base)
                    if path and not path.endswith("/"):  # consoles make "folder" objects
                        modified = item["LastModified"].timestamp()
                        found.append(
                            FileInfo(path, item["Size"], item["ETag"].strip('"'), modified)
                        )
        return sorted(found, key=lambda info: info.path)

    def read(self, path: str) -> bytes | None:
        with self._errors(path):
            try:
                body = self._s3.get_object(Bucket=self.bucket, Key=self._key(path))["Body"]
                return body.read()
            except ClientError as error:
                if error_code(error) == "NoSuchKey":
                    return None
                raise

    def read_start(self, path: str, count: int) -> bytes:
        with self._errors(path):
            try:
                body = self._s3.get_object(
                    Bucket=self.bucket, Key=self._key(path), Range=f"bytes=0-{count - 1}"
                )["Body"]
                return body.read(count)  # a store that knows no ranges sends all
            except ClientError as error:
                if error_code(error) != "NoSuchKey":
                    raise
                raise FileNotFoundError(f"{self.uri_of(path)} is missing") from error

    def write(self, path: str, data: bytes) -> None:
        with self._errors(path):
            self._s3.put_object(Bucket=self.bucket, Key=self._key(path), Body=data)

    def create(self, path: str, data: bytes) -> bool:
        """PUT with If-None-Match, where nothing was read before.

        A store that does not know the header ignores it or says so. There it is what is read back
        that counts.
        """
        if self.read(path) is not None:
            return False
        with self._errors(path):
            for attempt in range(CREATE_ATTEMPTS):
                try:
                    return self._create(path, data)
                except ClientError as error:
                    if error_code(error) not in _CONFLICT or attempt + 1 == CREATE_ATTEMPTS:
                        raise
                time.sleep(CONFLICT_SECONDS)
        raise AssertionError

    def _create(self, path: str, data: bytes) -> bool:
        key = self._key(path)
        try:
            self._s3.put_object(Bucket=self.bucket, Key=key, Body=data, IfNoneMatch="*")
        except ClientError as error:
            if error_code(error) in _THERE_ALREADY:
                # By this very call, where the answer to its first attempt was lost.
                again = error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0
                return again and self.read(path) == data
            if error_code(error) not in _UNKNOWN_HEADER:
                raise
            self.write(path, data)
        return self.read(path) == data

    def download(self, path: str, target: Path, on_bytes: OnBytes | None = None) -> None:
        """GET, in parallel parts when it is large."""
        with self._errors(path), replacing(target) as partial:
            try:
                self._s3.download_file(
                    self.bucket, self._key(path), str(partial), Callback=on_bytes
                )
            except ClientError as error:
                if error_code(error) not in ("404", "NoSuchKey"):
                    raise
                raise FileNotFoundError(f"{self.uri_of(path)} is missing") from error

    def upload(
        self,
        source: Path,
        path: str,
        on_bytes: OnBytes | None = None,
        *,
        sha256: str | None = None,
    ) -> None:
        """PUT, in parallel parts when it is large."""
        with self._errors(path):
            target = S3Object(self._s3, self.bucket, self._key(path))
            upload(target, source, on_bytes, sha256)

    def abandon(self, prefix: str) -> None:
        with self._errors(prefix):
            abort_uploads(self._s3, self.bucket, self._key(prefix))

    def delete(self, paths: Iterable[str]) -> None:
        """DeleteObjects, a thousand at a time."""
        keys = [self._key(path) for path in paths]
        for start in range(0, len(keys), _DELETE_AT_ONCE):
            some = keys[start : start + _DELETE_AT_ONCE]
            with self._errors(""):
                answer = self._s3.delete_objects(
                    Bucket=self.bucket,
                    Delete={"Objects": [{"Key": k} for k in some], "Quiet": True},
                )
            for failed in answer.get("Errors", []):
                raise stage_error(
                    failed.get("Code", ""),
                    f"s3://{self.bucket}/{failed.get('Key')}",
                    self._address,
                )

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{path}" if self.prefix else path

    def _probe(self, path: str) -> None:
        """Raise the error that a request with a body in its answer gets, if any."""
        self._s3.list_objects_v2(Bucket=self.bucket, Prefix=self._key(path), MaxKeys=1)

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        try:
            yield
        except (ClientError, BotoCoreError, boto3.exceptions.Boto3Error) as error:
            raise stage_error(error, self.uri_of(path), self._address) from error
        except OSError as error:
            denied = token_error(error, self.uri_of(path), self._address)
            if denied is None:
                raise
            raise denied from error


# --- Uploads -----------------------------------------------------------------------------------


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
    abort_uploads(s3, bucket, key, exactly=True)
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


def abort_uploads(s3: S3Client, bucket: str, prefix: str, *, exactly: bool = False) -> None:
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
