"""A prefix of a bucket, in Amazon S3 or a store that speaks its protocol."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
from botocore.exceptions import BotoCoreError, ClientError

from finetune_trainer.contract import Storage
from finetune_trainer.store import s3_upload
from finetune_trainer.store.folder import FileInfo, Folder, OnBytes
from finetune_trainer.store.local_folder import replacing
from finetune_trainer.store.s3_client import (
    client,
    error_code,
    find_address,
    stage_error,
    token_error,
)

CREATE_ATTEMPTS = 6  # while another writer of the same key is at it
CONFLICT_SECONDS = 0.2
_CONFLICT = {"409", "ConditionalRequestConflict", "OperationAborted"}
_THERE_ALREADY = {"412", "PreconditionFailed"}
_UNKNOWN_HEADER = {"501", "NotImplemented"}
_DELETE_AT_ONCE = 1000  # the most keys that one DeleteObjects takes


class S3Folder(Folder):
    """A prefix of a bucket."""

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
                        found.append(FileInfo(path, item["Size"], item["ETag"].strip('"')))
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
            target = s3_upload.S3Object(self._s3, self.bucket, self._key(path))
            s3_upload.upload(target, source, on_bytes, sha256)

    def abandon(self, prefix: str) -> None:
        with self._errors(prefix):
            s3_upload.abort(self._s3, self.bucket, self._key(prefix))

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
