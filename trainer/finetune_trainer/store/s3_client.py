"""A client for each store: its address, its keys, what every request to it carries, and what its
errors mean for the user."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
import botocore.session
from boto3.exceptions import Boto3Error
from botocore.config import Config
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
from botocore.utils import conditionally_calculate_md5

from finetune_trainer.contract import Encryption, Reason, StageError, Storage
from finetune_trainer.contract.base import names_user, redact
from finetune_trainer.contract.output import CREDENTIALS

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

LAST_RESORT = "us-east-1"  # boto3 wants a region, also for a store that has none
RETRIES = 5  # of each request, by botocore: waits of up to 1, 2, 4, 8 and 16 seconds

# What a store says when the bytes that arrived were not those that were sent, or too few.
DAMAGED = {"BadDigest", "IncompleteBody", "InvalidDigest", "XAmzContentSHA256Mismatch"}
_WITH_BODY = ("PutObject", "UploadPart", "DeleteObjects")
_MADE_ENCRYPTED = ("PutObject", "CreateMultipartUpload")


@dataclass(frozen=True)
class StoreAddress:
    """How to reach a store, as spec and environment say it together."""

    settings: Storage
    endpoint: str | None
    """None is Amazon S3."""

    region: str
    region_source: str
    """Who named the region, for messages."""

    keys: tuple[str, str, str | None] | None
    """Access key, secret key and session token, where the environment has them for this store."""

    @property
    def where(self) -> str:
        """The store in a message."""
        return self.endpoint or f"Amazon S3 (region {self.region}, from {self.region_source})"


def find_address(settings: Storage) -> StoreAddress:
    """Look up what the spec leaves to the environment; StageError where it makes no sense."""
    # A store of its own has variables of its own, and takes nothing from the main store's.
    key, secret, token, endpoint = (
        os.environ.get(settings.variables + name) for name in CREDENTIALS
    )
    if settings.variables and bool(key) != bool(secret):
        raise StageError(
            Reason.STORAGE_ACCESS_DENIED,
            f"The Secret of {settings.field}.secretRef has only one of AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY: add the other.",
        )
    endpoint = settings.endpoint or endpoint
    if not settings.variables:
        endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL")
    _check_endpoint(endpoint, settings)
    region, source = _region(settings)
    keys = (key, secret, token or None) if key and secret else None
    return StoreAddress(settings, endpoint or None, region, source, keys)


def _check_endpoint(endpoint: str | None, settings: Storage) -> None:
    if not endpoint:
        return
    named = f"{settings.field}.endpoint" if settings.endpoint else "AWS_ENDPOINT_URL_S3"
    if names_user(endpoint):
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{named} has a user or password in it: give only http(s)://host:port there, and the "
            f"keys in the Secret of {settings.field}.secretRef.",
        )
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise StageError(
            Reason.INVALID_CONFIG, f"{named} {endpoint!r} is not a URL: write http(s)://host:port."
        )


def _region(settings: Storage) -> tuple[str, str]:
    if settings.region:
        return settings.region, f"{settings.field}.region"
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):  # boto3 itself reads only the second
        if value := os.environ.get(name):
            return value, name
    profile = boto3.session.Session().region_name
    return (profile, "the AWS profile") if profile else (LAST_RESORT, "the default")


@lru_cache(maxsize=8)
def client(address: StoreAddress) -> S3Client:
    """One client per store, for all threads."""
    settings = address.settings
    own_store = address.endpoint is not None
    style = {True: "path", False: "virtual", None: "path" if own_store else "auto"}
    options: dict[str, Any] = {
        "connect_timeout": 5,
        "read_timeout": 60,
        "retries": {"mode": "standard", "max_attempts": RETRIES},
        "max_pool_connections": 16,
        "s3": {"addressing_style": style[settings.path_style]},
        # Other stores often don't know the checksums that Amazon S3 introduced in 2025. Content-MD5
        # is what all of them check, Amazon too.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required" if own_store else "when_supported",
        "ignore_configured_endpoint_urls": bool(settings.variables),
    }
    key, secret, token = address.keys or (None, None, None)
    try:
        found = _session(settings).client(
            "s3",
            endpoint_url=address.endpoint,
            region_name=address.region,
            aws_access_key_id=key,
            aws_secret_access_key=secret,
            aws_session_token=token,
            config=Config(**options),
        )
    except ValueError as error:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{settings.field} names no store: endpoint {address.endpoint!r}, region "
            f"{address.region!r} from {address.region_source}. Write http(s)://host:port.",
        ) from error
    _add_hooks(found, settings.encryption)
    return found


def _session(settings: Storage) -> boto3.session.Session:
    """The default chain of credentials, in which the environment's keys are the main store's."""
    session = botocore.session.Session()
    if settings.variables:
        session.get_component("credential_provider").remove("env")
    return boto3.session.Session(botocore_session=session)


def _add_hooks(s3: S3Client, encryption: Encryption | None) -> None:
    events = s3.meta.events
    for operation in _WITH_BODY:
        events.register(f"before-call.s3.{operation}", _add_md5)
    events.register_first("needs-retry.s3", _retry_damaged)
    if encryption:
        wanted = {"ServerSideEncryption": str(encryption.algorithm)}
        if encryption.kms_key_id:
            wanted["SSEKMSKeyId"] = encryption.kms_key_id

        def ask(params: dict[str, Any], **_: object) -> None:
            params.update(wanted)

        for operation in _MADE_ENCRYPTED:
            events.register(f"before-parameter-build.s3.{operation}", ask)


def _add_md5(params: dict[str, Any], **_: object) -> None:
    """Content-MD5 in place of a CRC32, which not every store knows.

    Where botocore adds none (S3 Express, a Python without MD5), the CRC32 stays.
    """
    checksum = params["context"].get("checksum", {})
    algorithm = checksum.pop("request_algorithm", None)
    conditionally_calculate_md5(params)
    if algorithm and "Content-MD5" not in params["headers"]:
        checksum["request_algorithm"] = algorithm


def _retry_damaged(response: tuple[Any, dict[str, Any]] | None, **_: object) -> None:
    """Let botocore send again what arrived damaged: it repeats what has the status 503."""
    if response and response[1].get("Error", {}).get("Code") in DAMAGED:
        response[0].status_code = 503


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
