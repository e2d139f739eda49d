"""The artifacts where they lie: in the bucket, with the user's own keys or AWS profile, or in a
folder of this machine. A download goes on where it was cut off; it counts when its SHA-256 fits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_cli.exits import CliError, ExitCode
from finetune_cli.job import Job

CHUNK = 1 << 20
ATTEMPTS = 5  # of a download, each going on where the one before was cut off
_ABSENT = {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}
_DENIED = {"401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"}
_DENIED |= {"ExpiredToken", "Forbidden", "InvalidToken"}
KEYS = (
    "Give your own keys: AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
    "(the job's Secret stays in the cluster)."
)

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Bucket:
    """The store of a job's output."""

    client: Any
    where: str

    @classmethod
    def of(cls, job: Job, endpoint: str | None = None) -> Bucket:
        """The store that a job's spec names, or another endpoint of it."""
        from botocore.exceptions import BotoCoreError

        from finetune_trainer.contract import StageError, Storage

        if not str(job.spec["output"]["uri"]).startswith("s3://"):
            return cls(None, "this machine")
        from finetune_trainer.store.s3_client import client, find_address

        said = job.spec.get("storage") or {}
        known = {key: said[key] for key in ("endpoint", "region", "pathStyle") if key in said}
        if endpoint:
            known["endpoint"] = endpoint
        try:
            address = find_address(Storage.model_validate(known))
            return cls(client(address), address.where)
        except StageError as error:
            raise CliError(ExitCode.USAGE, error.message) from error
        except BotoCoreError as error:  # e.g. a profile that isn't there
            raise CliError(ExitCode.REFUSED, f"{error}. {KEYS}") from error

    def read(self, uri: str) -> bytes:
        """A small file as a whole."""
        return b"".join(self.pieces(uri))

    def size(self, uri: str) -> int:
        """Bytes of a file."""
        with self._errors(uri):
            if self.client is None:
                return Path(uri).stat().st_size
            bucket, _, key = uri.removeprefix("s3://").partition("/")
            return int(self.client.head_object(Bucket=bucket, Key=key)["ContentLength"])

    def download(
        self, uri: str, target: Path, size: int, sha256: str, on_bytes: OnBytes | None = None
    ) -> bool:
        """Fetch a file, or the rest of it; False where it is here already."""
        if target.is_file() and target.stat().st_size == size and digest(target) == sha256:
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        resumed = part.is_file() and part.stat().st_size > 0
        self._fetch(uri, part, size, on_bytes)
        if digest(part) != sha256:
            part.unlink()
            if not resumed:
                raise CliError(
                    ExitCode.FAILED,
                    f"{uri} doesn't have the SHA-256 that the manifest names: it was changed or "
                    "damaged, and is not kept.",
                )
            return self.download(uri, target, size, sha256, on_bytes)
        part.replace(target)
        return True

    def _fetch(self, uri: str, part: Path, size: int, on_bytes: OnBytes | None) -> None:
        """Append what is missing, with a new connection where one breaks."""
        for attempt in range(1, ATTEMPTS + 1):
            start = part.stat().st_size if part.is_file() else 0
            if start > size:
                part.unlink()
                start = 0
            if start == size and part.is_file():
                return
            try:
                with part.open("ab") as sink:
                    for piece in self.pieces(uri, start):
                        sink.write(piece)
                        if on_bytes:
                            on_bytes(len(piece))
            except CliError as error:
                if error.code is not ExitCode.UNREACHABLE or attempt == ATTEMPTS:
                    raise
        if part.stat().st_size != size:
            raise CliError(
                ExitCode.FAILED, f"{uri} has {part.stat().st_size} bytes, and should have {size}."
            )

    def pieces(self, uri: str, start: int = 0) -> Iterator[bytes]:
        """A file as it comes, from a byte on."""
        with self._errors(uri):
            if self.client is None:
                with Path(uri).open("rb") as source:
                    source.seek(start)
                    yield from iter(lambda: source.read(CHUNK), b"")
                return
            bucket, _, key = uri.removeprefix("s3://").partition("/")
            wanted = {"Range": f"bytes={start}-"} if start else {}
            answer = self.client.get_object(Bucket=bucket, Key=key, **wanted)
            yield from answer["Body"].iter_chunks(CHUNK)

    @contextmanager
    def _errors(self, uri: str) -> Iterator[None]:
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            NoCredentialsError,
            ProfileNotFound,
        )
        from urllib3.exceptions import HTTPError

        try:
            yield
        except FileNotFoundError as error:
            raise CliError(ExitCode.NOT_FOUND, f"there is no {uri} on this machine.") from error
        except ClientError as error:
            raise self._refused(uri, str(error.response["Error"].get("Code", ""))) from error
        except (NoCredentialsError, ProfileNotFound) as error:
            said = f"no keys for {self.where}: {error}. {KEYS}"
            raise CliError(ExitCode.REFUSED, said) from error
        except (BotoCoreError, HTTPError, OSError) as error:
            said = f"{self.where} can't be reached: {error}. --endpoint names another address."
            raise CliError(ExitCode.UNREACHABLE, said) from error

    def _refused(self, uri: str, code: str) -> CliError:
        if code in _ABSENT:
            return CliError(ExitCode.NOT_FOUND, f"there is no {uri} in {self.where} ({code}).")
        if code in _DENIED:
            said = f"{self.where} refuses to let you read {uri} ({code}). {KEYS}"
            return CliError(ExitCode.REFUSED, said)
        return CliError(ExitCode.UNREACHABLE, f"{self.where} answers {code} for {uri}; try again.")


def digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
