"""A prefix of a bucket, in Amazon S3 or a store that speaks its protocol."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)

from finetune_trainer.contract import Reason, StageError, Storage
from finetune_trainer.store import s3_upload
from finetune_trainer.store.folder import FileInfo, Folder, OnBytes
from finetune_trainer.store.local import replacing

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


_DENIED = {
    "401",
    "403",
    "AccessDenied",
    "AllAccessDisabled",
    "ExpiredToken",
    "Forbidden",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
}
# What a store says when the bytes that arrived are not those that were sent, or too few.
DAMAGED = {"BadDigest", "IncompleteBody", "InvalidDigest", "XAmzContentSHA256Mismatch"}
_WRONG_REGION = {"301", "AuthorizationHeaderMalformed", "PermanentRedirect"}
_NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)


class DamagedError(Exception):
    """The store took other bytes than were sent."""


def error_code(error: ClientError) -> str:
    """The store's code, e.g. NoSuchKey; the HTTP status where the answer had no body."""
    return str(error.response.get("Error", {}).get("Code", ""))


def stage_error(error: Exception | str, uri: str, settings: Storage) -> StageError:
    """Turn an error of boto3, or an S3 error code, into a reason and a message with a remedy."""
    if isinstance(error, Boto3Error) and isinstance(error.__context__, ClientError):
        error = error.__context__  # upload_file wraps what the store said
    if isinstance(error, ClientError):
        error = error_code(error)
    if isinstance(error, str):
        return _from_code(error, uri, settings)
    if isinstance(error, _NO_CREDENTIALS):
        return StageError(
            Reason.STORAGE_ACCESS_DENIED,
            f"There are no credentials for {uri}: name a Secret with AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY in spec.storage.secretRef, or use workload identity.",
        )
    if isinstance(error, ParamValidationError):
        return StageError(Reason.INVALID_CONFIG, f"{uri} is not a valid S3 location: {error}")
    if isinstance(error, DamagedError):
        return _damaged(uri, str(error), settings)
    # What is left of botocore's errors is about the connection.
    kind = type(error).__name__ if isinstance(error, BotoCoreError | Boto3Error) else "error"
    return StageError(
        Reason.STORAGE_UNAVAILABLE,
        f"The object store at {_where(settings)} can't be reached for {uri} ({kind}): check "
        "spec.storage.endpoint, DNS, TLS and network policies.",
    )


def _from_code(code: str, uri: str, settings: Storage) -> StageError:
    bucket = uri.removeprefix("s3://").partition("/")[0]
    if code == "NoSuchBucket":
        return StageError(
            Reason.BUCKET_NOT_FOUND,
            f"The bucket {bucket!r} of {uri} does not exist at {_where(settings)}: create it, or "
            "correct the URI or spec.storage.endpoint.",
        )
    if code in _DENIED:
        return StageError(
            Reason.STORAGE_ACCESS_DENIED,
            f"The store refuses access to {uri} ({code}): check the keys in the Secret of "
            f"spec.storage.secretRef, and that they may read, list and write in {bucket!r}.",
        )
    if code in DAMAGED:
        return _damaged(uri, code, settings)
    if code in _WRONG_REGION:
        return StageError(
            Reason.INVALID_CONFIG,
            f"The bucket {bucket!r} of {uri} is not in region {settings.region!r} ({code}): set "
            "spec.storage.region to the bucket's.",
        )
    return StageError(
        Reason.STORAGE_UNAVAILABLE,
        f"The object store at {_where(settings)} answered {code or 'an error'} for {uri}.",
    )


def _damaged(uri: str, cause: str, settings: Storage) -> StageError:
    return StageError(
        Reason.STORAGE_UNAVAILABLE,
        f"{uri} does not arrive at {_where(settings)} as it was sent, time and again ({cause}): "
        "look at the proxies and network devices on the way, and at the memory of the node.",
    )


def endpoint_of(settings: Storage) -> str | None:
    """The store's URL: the spec's, else the one that came with the keys; None is Amazon S3."""
    named = (os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))
    return settings.endpoint or next((url for url in named if url), None)


def _where(settings: Storage) -> str:
    return endpoint_of(settings) or f"Amazon S3 ({settings.region})"


# A store copies so much within the read timeout, and one request may copy 5 GiB at most.
COPYING = TransferConfig(
    multipart_threshold=1 << 30, multipart_chunksize=1 << 28, max_concurrency=4
)
_DELETE_AT_ONCE = 1000  # the most keys that one DeleteObjects takes


@lru_cache(maxsize=8)
def client(endpoint: str | None, region: str) -> S3Client:
    """One client per store, for all threads; credentials come from the environment."""
    own_store = endpoint is not None
    config = Config(
        connect_timeout=5,
        read_timeout=60,
        retries={"mode": "standard", "max_attempts": 5},
        max_pool_connections=16,
        # Other stores often have no DNS name per bucket and no support for the checksums that
        # Amazon S3 introduced in 2025. Uploads carry Content-MD5, which all of them check, Amazon
        # too: a second checksum would cost another pass over the bytes.
        s3={"addressing_style": "path" if own_store else "auto"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required" if own_store else "when_supported",
    )
    try:
        return boto3.client("s3", endpoint_url=endpoint, region_name=region, config=config)
    except ValueError as error:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"storage.endpoint {endpoint!r} is not a URL: write http(s)://host:port.",
        ) from error


class S3Folder(Folder):
    """A prefix of a bucket."""

    def __init__(self, bucket: str, prefix: str, settings: Storage) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._settings = settings
        self._s3 = client(endpoint_of(settings), settings.region)

    def stat(self, path: str) -> FileInfo | None:
        """HEAD; the answer to a failed one has no body, so a listing is asked what it means."""
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
        """ListObjectsV2, all pages."""
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
        """GET."""
        with self._errors(path):
            try:
                body = self._s3.get_object(Bucket=self.bucket, Key=self._key(path))["Body"]
                return body.read()
            except ClientError as error:
                if error_code(error) == "NoSuchKey":
                    return None
                raise

    def read_start(self, path: str, count: int) -> bytes:
        """GET with a range."""
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
        """PUT."""
        with self._errors(path):
            s3_upload.put(self._object(path), data)

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
        """PUT, in parallel parts when it is large; what an earlier attempt left is gone on with."""
        with self._errors(path):
            s3_upload.upload(self._object(path), source, on_bytes, sha256)

    def copy(self, source: str, target: str) -> None:
        """CopyObject, in parallel parts when it is large."""
        with self._errors(source):
            try:
                self._s3.copy(
                    {"Bucket": self.bucket, "Key": self._key(source)},
                    self.bucket,
                    self._key(target),
                    Config=COPYING,
                )
            except ClientError as error:
                if error_code(error) not in ("404", "NoSuchKey"):
                    raise
                raise FileNotFoundError(f"{self.uri_of(source)} is missing") from error

    def abandon(self, prefix: str) -> None:
        """AbortMultipartUpload."""
        with self._errors(prefix):
            s3_upload.abort_all(self._s3, self.bucket, self._key(prefix))

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
                    self._settings,
                )

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{path}" if self.prefix else path

    def _object(self, path: str) -> s3_upload.Key:
        return s3_upload.Key(self._s3, self.bucket, self._key(path))

    def _probe(self, path: str) -> None:
        """Raise the error that a request with a body in its answer gets, if any."""
        self._s3.list_objects_v2(Bucket=self.bucket, Prefix=self._key(path), MaxKeys=1)

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        try:
            yield
        except (
            ClientError,
            BotoCoreError,
            boto3.exceptions.Boto3Error,
            DamagedError,
        ) as error:
            raise stage_error(error, self.uri_of(path), self._settings) from error
