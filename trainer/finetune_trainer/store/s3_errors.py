"""What an S3 error means for the user."""

from __future__ import annotations

import os

from boto3.exceptions import Boto3Error
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)

from finetune_trainer.contract import Reason, StageError, Storage

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
