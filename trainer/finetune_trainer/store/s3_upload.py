"""Uploads to S3 that the store verifies and that a later process continues.

boto3's `upload_file` (s3transfer) sends parts in parallel as well. But it aborts everything when
one part fails, leaves a killed upload where nothing finds it, sends no checksum to a store other
than Amazon's, and takes no SHA-256 that the file should have. So this module sends the parts:

- Each request carries Content-MD5, which every S3 store checks. Parts that arrive damaged or not at
  all are sent again: by botocore's own retries, and by some more around them.
- It finds an unfinished upload of the same key (ListMultipartUploads, ListParts). Parts whose ETag
  is the MD5 of the local bytes stay, the others are sent.
- Requests read from the file as they go. No part is held in memory.
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypedDict, TypeVar, cast

from botocore.exceptions import ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as NoConnectionError
from s3transfer.utils import ReadFileChunk

from finetune_trainer.store.folder import OnBytes
from finetune_trainer.store.parts import (
    ChangedFileError,
    Part,
    check_sha256,
    fits_one_request,
    multipart_etag,
    part_size,
    read_part,
    read_parts,
)
from finetune_trainer.store.s3_errors import DAMAGED, DamagedError, error_code

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

THREADS = 4
ATTEMPTS = 6
"""Of one request, each with botocore's own retries within."""

PAUSE_SECONDS = 0.25  # before the second attempt; doubled before each further one
_TRANSIENT = DAMAGED | {"InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown"}
_ETAG = re.compile(r"[0-9a-f]{32}")
_MULTIPART_ETAG = re.compile(r"[0-9a-f]{32}-\d+")
_ANY_ETAG = re.compile(r".*")
_NOT_FOUND = ("404", "NoSuchKey", "NoSuchUpload")

log = logging.getLogger(__name__)

T = TypeVar("T")


class ObjectArguments(TypedDict):
    """The arguments that name an object in every request."""

    Bucket: str
    Key: str


@dataclass(frozen=True)
class S3Object:
    """An object, existing or not."""

    s3: S3Client
    bucket: str
    name: str

    @property
    def arguments(self) -> ObjectArguments:
        """As arguments of a request."""
        return ObjectArguments(Bucket=self.bucket, Key=self.name)


def upload(target: S3Object, source: Path, on_bytes: OnBytes | None, sha256: str | None) -> None:
    """Upload a file; the object appears as a whole, or not at all.

    `on_bytes` hears of bytes that the store has, each once; whatever it raises ends the upload.
    Raises StageError when the file is not the one of `sha256`, else botocore's errors and
    DamagedError.
    """
    size = source.stat().st_size
    if fits_one_request(size):
        put(target, source.read_bytes(), source, sha256)
        if on_bytes:
            on_bytes(size)
        return
    _Upload(target, source, size, on_bytes or (lambda _: None)).run(sha256)


def put(
    target: S3Object, data: bytes, source: Path | None = None, sha256: str | None = None
) -> None:
    """Upload what fits into one request."""
    if source:
        check_sha256(source, hashlib.sha256(data).hexdigest(), sha256)
    part = Part(1, 0, len(data), hashlib.md5(data, usedforsecurity=False).digest())

    def send() -> None:
        answer = target.s3.put_object(**target.arguments, Body=data, ContentMD5=part.content_md5)
        _check_etag(answer, part.etag, _ETAG)

    retry(send)


def abort_all(s3: S3Client, bucket: str, prefix: str) -> None:
    """Drop the unfinished uploads of all keys below a prefix."""
    for name, upload_id in _unfinished(s3, bucket, prefix):
        _abort(S3Object(s3, bucket, name), upload_id)


def retry(call: Callable[[], T], stopping: threading.Event | None = None) -> T:
    """Repeat a request that failed on the way; raises the last failure."""
    stopping = stopping or threading.Event()
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except (NoConnectionError, HTTPClientError, ClientError, DamagedError) as error:
            if attempt == ATTEMPTS - 1 or not _is_transient(error) or stopping.is_set():
                raise
            log.info("An upload is sent again: %s", error)
        # Jitter, lest all parts come back at once.
        stopping.wait(PAUSE_SECONDS * 2**attempt * random.uniform(0.5, 1))  # noqa: S311
    raise AssertionError


def _is_transient(error: Exception) -> bool:
    if not isinstance(error, ClientError):
        return True
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return error_code(error) in _TRANSIENT or status >= 500


class _Upload:
    """One file on its way, in parts."""

    def __init__(self, target: S3Object, source: Path, size: int, on_bytes: OnBytes) -> None:
        self._target = target
        self._source = source
        self._size = size
        self._part_size = part_size(size)
        self._on_bytes = on_bytes
        self._stopping = threading.Event()
        self._upload_id = ""
        self._there: Mapping[int, str] = {}
        self._done: dict[int, str] = {}

    def run(self, sha256: str | None) -> None:
        """Send what the store lacks, and put the object together."""
        self._upload_id, self._there = self._resume() or (self._create(), {})
        if self._there:
            log.info("%s: going on after %d parts", self._target.name, len(self._there))
        digests: list[bytes] = []
        try:
            with self._sending() as send:
                for part in read_parts(self._source, self._size, sha256):
                    digests.append(part.md5)
                    send(part)
        except ChangedFileError:  # its parts are of no use to anyone
            _abort(self._target, self._upload_id)
            raise
        self._complete(multipart_etag(digests))

    def _resume(self) -> tuple[str, dict[int, str]] | None:
        """The unfinished upload of this content with the ETags of its parts; others are aborted."""
        found = None
        for name, upload_id in _unfinished(self._target.s3, self._target.bucket, self._target.name):
            if name != self._target.name:
                continue
            parts = None if found else self._parts_of(upload_id)
            if parts is None:
                _abort(self._target, upload_id)
            else:
                found = upload_id, parts
        return found

    def _parts_of(self, upload_id: str) -> dict[int, str] | None:
        """The parts of an upload by number; None when the first is of another file."""
        pages = self._target.s3.get_paginator("list_parts")
        try:
            listed = [
                item
                for page in pages.paginate(**self._target.arguments, UploadId=upload_id)
                for item in page.get("Parts", [])
            ]
        except ClientError as error:
            log.info("%s: its parts can't be listed (%s)", self._target.name, error_code(error))
            return None
        parts = {item["PartNumber"]: item["ETag"].strip('"') for item in listed}
        if not parts:
            return {}
        first = read_part(self._source, min(parts), self._part_size)
        return parts if parts[first.number] == first.etag else None

    def _create(self) -> str:
        return retry(lambda: self._target.s3.create_multipart_upload(**self._target.arguments))[
            "UploadId"
        ]

    @contextmanager
    def _sending(self) -> Iterator[Callable[[Part], None]]:
        """Yields what takes a part; as many as there are threads are on their way at once."""
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="upload")
        running: set[Future[None]] = set()

        def leave_running(most: int) -> None:
            """Wait until so many are left; raises what one that ended has raised."""
            nonlocal running
            while len(running) > most:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()

        def send(part: Part) -> None:
            leave_running(THREADS - 1)
            running.add(pool.submit(self._send, part))

        try:
            yield send
            leave_running(0)
        finally:
            self._stopping.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _send(self, part: Part) -> None:
        if self._there.get(part.number) != part.etag:
            self._done[part.number] = retry(lambda: self._put_part(part), self._stopping)
        else:
            self._done[part.number] = part.etag
        self._on_bytes(part.size)

    def _put_part(self, part: Part) -> str:
        body = ReadFileChunk.from_filename(str(self._source), part.start, part.size)
        try:
            answer = self._target.s3.upload_part(
                **self._target.arguments,
                UploadId=self._upload_id,
                PartNumber=part.number,
                Body=cast("IO[bytes]", body),
                ContentMD5=part.content_md5,
            )
        finally:
            body.close()
        _check_etag(answer, part.etag, _ETAG)
        return answer["ETag"].strip('"')

    def _complete(self, etag: str) -> None:
        parts: list[CompletedPartTypeDef] = [
            {"PartNumber": number, "ETag": f'"{self._done[number]}"'}
            for number in sorted(self._done)
        ]

        def finish() -> bool:
            try:
                self._target.s3.complete_multipart_upload(
                    **self._target.arguments,
                    UploadId=self._upload_id,
                    MultipartUpload={"Parts": parts},
                )
            except ClientError as error:
                # It is over already where the answer to an earlier attempt was lost.
                if error_code(error) not in _NOT_FOUND:
                    raise
                return False
            return True

        known = retry(finish)
        head = retry(lambda: self._target.s3.head_object(**self._target.arguments))
        if head["ContentLength"] != self._size:
            raise DamagedError(f"it has {head['ContentLength']} bytes instead of {self._size}")
        _check_etag(head, etag, _MULTIPART_ETAG if known else _ANY_ETAG)


def _check_etag(answer: Mapping[str, Any], expected: str, rule: re.Pattern[str]) -> None:
    """DamagedError when an ETag is an MD5, but not the one of what was sent.

    Where the store encrypts with a key of its own service it is no MD5 but looks like one.
    """
    etag = str(answer.get("ETag", "")).strip('"')
    keyed = str(answer.get("ServerSideEncryption", "")).startswith("aws:kms")
    if etag != expected and rule.fullmatch(etag) and not keyed:
        raise DamagedError(f"the store has ETag {etag} for what has {expected}")


def _unfinished(s3: S3Client, bucket: str, prefix: str) -> list[tuple[str, str]]:
    """Key and id of unfinished uploads; none where the credentials may not list them."""
    pages = s3.get_paginator("list_multipart_uploads")
    try:
        return [
            (item["Key"], item["UploadId"])
            for page in pages.paginate(Bucket=bucket, Prefix=prefix)
            for item in page.get("Uploads", [])
        ]
    except ClientError as error:
        log.info("Unfinished uploads can't be looked for (%s)", error_code(error))
        return []


def _abort(target: S3Object, upload_id: str) -> None:
    try:
        target.s3.abort_multipart_upload(**target.arguments, UploadId=upload_id)
    except ClientError as error:
        if error_code(error) not in _NOT_FOUND:
            log.warning("%s: an unfinished upload stays (%s)", target.name, error_code(error))
