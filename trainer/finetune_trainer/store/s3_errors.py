"""What an S3 error means for the user."""

from __future__ import annotations

import os
import re

from boto3.exceptions import Boto3Error
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    MetadataRetrievalError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    SSLError,
)

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.contract.redaction import redact
from finetune_trainer.store.s3_client import DAMAGED, StoreAddress

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
_WRONG_REGION = {"301", "AuthorizationHeaderMalformed", "PermanentRedirect"}
_NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError)
# Requests that get credentials, of STS and its relatives.
_IDENTITY = {
    "AssumeRole",
    "AssumeRoleWithWebIdentity",
    "GetRoleCredentials",
    "GetCredentialsForIdentity",
}
_IDENTITY_LATER = {"IDPCommunicationError", "InternalFailure", "ServiceUnavailable", "Throttling"}
_VERIFY_FAILED = re.compile(r"certificate verify failed: [^(\\\]\"')]+")
TOKEN_FILE = "AWS_WEB_IDENTITY_TOKEN_FILE"  # noqa: S105 - the name of a variable


def error_code(error: ClientError) -> str:
    """The store's code, e.g. NoSuchKey; the HTTP status where the answer had no body."""
    return str(error.response.get("Error", {}).get("Code", ""))


def stage_error(error: Exception | str, uri: str, address: StoreAddress) -> StageError:
    """Turn an error of boto3, or an S3 error code, into a reason and a message with a remedy."""
    if isinstance(error, Boto3Error) and isinstance(error.__context__, ClientError):
        error = error.__context__  # boto3's transfers wrap what the store said
    if isinstance(error, ClientError) and error.operation_name in _IDENTITY:
        return _from_identity(error, uri, address)
    if isinstance(error, ClientError):
        error = error_code(error)
    if isinstance(error, str):
        return _from_code(error, uri, address)
    return _before_an_answer(error, uri, address)


def _before_an_answer(error: Exception, uri: str, address: StoreAddress) -> StageError:
    """What kept a request from being sent, or answered."""
    field = address.settings.field
    if isinstance(error, _NO_CREDENTIALS):
        return StageError(
            Reason.STORAGE_ACCESS_DENIED,
            f"There are no credentials for {uri}: name a Secret with AWS_ACCESS_KEY_ID and "
            f"AWS_SECRET_ACCESS_KEY in {field}.secretRef, or use workload identity "
            "(spec.serviceAccountName).",
        )
    if isinstance(error, CredentialRetrievalError | MetadataRetrievalError):
        return _no_identity(str(error), uri, address)
    if isinstance(error, ParamValidationError):
        return StageError(Reason.INVALID_CONFIG, f"{uri} is not a valid S3 location: {error}")
    if isinstance(error, SSLError):
        return _not_trusted(error, uri, address)
    # What is left of botocore's errors is about the connection.
    kind = type(error).__name__ if isinstance(error, BotoCoreError | Boto3Error) else "error"
    return StageError(
        Reason.STORAGE_UNAVAILABLE,
        f"The object store at {address.where} can't be reached for {uri} ({kind}): check "
        f"{field}.endpoint, DNS, TLS, proxies and network policies.",
    )


def token_error(error: OSError, uri: str, address: StoreAddress) -> StageError | None:
    """What it means that the token of workload identity can't be read; None for other files."""
    if not error.filename or str(error.filename) != os.environ.get(TOKEN_FILE):
        return None
    return _no_identity(f"{error.filename}: {error.strerror}", uri, address)


def _from_identity(error: ClientError, uri: str, address: StoreAddress) -> StageError:
    said = str(error.response.get("Error", {}).get("Message", "")).strip()
    cause = f"{error_code(error)}: {said}" if said else error_code(error)
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if error_code(error) in _IDENTITY_LATER or status >= 500:
        return StageError(
            Reason.STORAGE_UNAVAILABLE,
            f"The credentials for {uri} can't be had now ({error.operation_name}: "
            f"{redact(cause):.300}): the service that gives them is at fault, or its limits.",
        )
    return _no_identity(f"{error.operation_name}: {cause}", uri, address)


def _no_identity(cause: str, uri: str, address: StoreAddress) -> StageError:
    cause = " ".join(redact(cause).split())[:300]
    return StageError(
        Reason.STORAGE_ACCESS_DENIED,
        f"The pod's identity gets no credentials for {uri} ({cause}): look at the ServiceAccount "
        "of spec.serviceAccountName, its annotations and the role's trust policy, or name a Secret "
        f"with keys in {address.settings.field}.secretRef.",
    )


def _not_trusted(error: SSLError, uri: str, address: StoreAddress) -> StageError:
    """The certificate, or TLS itself, is not what it should be."""
    # urllib3's error says it as in: (_ssl.c:1006) after the words.
    said = str(error.kwargs.get("error", error))
    found = _VERIFY_FAILED.search(said)
    reason = found[0].strip() if found else redact(said)[-300:]
    return StageError(
        Reason.STORAGE_UNAVAILABLE,
        f"The object store at {address.where} is not trusted for {uri} ({reason}): "
        f"where a CA of your own signed its certificate, name it in {address.settings.field}."
        "caBundle; else check the certificate, the host's name in the endpoint, and proxies.",
    )


def _from_code(code: str, uri: str, address: StoreAddress) -> StageError:
    bucket = uri.removeprefix("s3://").partition("/")[0]
    field = address.settings.field
    if code == "NoSuchBucket":
        return StageError(
            Reason.BUCKET_NOT_FOUND,
            f"The bucket {bucket!r} of {uri} does not exist at {address.where}: create it, or "
            f"correct the URI or {field}.endpoint.",
        )
    if code in _DENIED:
        who = f"check the keys in the Secret of {field}.secretRef, and that they"
        if not address.keys:
            who = f"check that spec.serviceAccountName's identity (there is no {field}.secretRef)"
        return StageError(
            Reason.STORAGE_ACCESS_DENIED,
            f"The store refuses access to {uri} ({code}): {who} may read, list and write in "
            f"{bucket!r}.",
        )
    if code in DAMAGED:
        return StageError(
            Reason.STORAGE_UNAVAILABLE,
            f"{uri} does not arrive at {address.where} as it was sent, time and again ({code}): "
            "look at the proxies and network devices on the way, and at the memory of the node.",
        )
    if code in _WRONG_REGION:
        return StageError(
            Reason.INVALID_CONFIG,
            f"The bucket {bucket!r} of {uri} is not in region {address.region!r}, which came from "
            f"{address.region_source} ({code}): set {field}.region to the bucket's.",
        )
    return StageError(
        Reason.STORAGE_UNAVAILABLE,
        f"The object store at {address.where} answered {code or 'an error'} for {uri}.",
    )
