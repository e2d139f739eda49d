"""Certificate authorities of one's own, trusted beside the public ones, for every connection."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.contract.storage import CA_BUNDLES

BUNDLE = "ca-bundle.pem"
# Of boto3, of httpx (the Hub's client) and OpenSSL, and of requests (experiment trackers).
VARIABLES = ("AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")


def trust_given_authorities(workspace: Path) -> None:
    """Write one bundle of the public and the given certificates, and let all libraries read it.

    Also the libraries of processes that start later. Call it before the first connection. Raises
    StageError when a file is missing or holds no certificate.
    """
    given = os.environ.get(CA_BUNDLES)
    if not given:
        return
    import certifi  # noqa: PLC0415 - most stages do without

    named = {os.environ[name] for name in VARIABLES if os.environ.get(name)}
    parts = [Path(path).read_text() for path in sorted({certifi.where(), *named})]
    for entry in given.split(":"):
        field, _, path = entry.partition("=")
        parts.append(_certificates(field, Path(path)))
    workspace.mkdir(parents=True, exist_ok=True)
    bundle = workspace / BUNDLE
    bundle.write_text("\n".join(parts))
    for name in VARIABLES:
        os.environ[name] = str(bundle)


def _certificates(field: str, file: Path) -> str:
    try:
        text = file.read_text()
    except OSError as error:
        raise StageError(
            Reason.STORAGE_UNAVAILABLE,
            f"The certificates of {field} are not there ({file}: {error.strerror}): check that the "
            "ConfigMap or Secret exists and has the key.",
        ) from error
    except UnicodeDecodeError as error:
        raise _no_certificate(field, "it is not text") from error
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError) as error:
        raise _no_certificate(field, str(error)) from error
    return text


def _no_certificate(field: str, cause: str) -> StageError:
    return StageError(
        Reason.INVALID_CONFIG,
        f"The key that {field} names holds no certificates ({cause}): put PEM there, which begins "
        "with -----BEGIN CERTIFICATE-----.",
    )
