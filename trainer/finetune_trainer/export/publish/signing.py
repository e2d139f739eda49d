"""model.sig: a signature of the files by model-signing (OpenSSF), made offline with a private key.

It is a Sigstore bundle over an in-toto statement that names every signed file with its SHA-256.
`model_signing verify key FOLDER --signature FOLDER/model.sig --public_key key.pub` checks it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from finetune_trainer.contract import (
    REJECTED,
    SIGNING_KEY_FILE,
    Artifact,
    Export,
    Reason,
    StageError,
)
from finetune_trainer.runtime import child
from finetune_trainer.store.marker import MANIFEST

if TYPE_CHECKING:
    from model_signing import signing

SIGNATURE = "model.sig"
FORMER_VARIABLE = "FINETUNE_SIGNING_KEY"
"""Where operators up to 0.1.0 put the private key itself, in place of SIGNING_KEY_FILE."""

log = logging.getLogger(__name__)

# Beside the signed files in the version's folder; verifiers pass over them. manifest.json lists the
# signature and so can't be signed: provenance.json says the same and is.
NOT_SIGNED = (SIGNATURE, MANIFEST, REJECTED)


class Signer:
    """Signs files that are known by their SHA-256: they need not be on this disk."""

    def __init__(self, name: str, key: Path) -> None:
        """`name` is the model's, for the statement; `key` is a file in PEM, which is read now.

        Raises StageError if the key is unusable.
        """
        self._name = name
        self._config = _config(key)

    def __call__(self, artifacts: Iterable[Artifact]) -> dict[str, bytes]:
        """The signature's file, by its path."""
        signed = [item for item in artifacts if not item.rejected]
        self._config.set_hashing_config(_known(self._name, signed))
        with TemporaryDirectory() as folder:
            file = Path(folder) / SIGNATURE
            self._config.sign(folder, file)
            return {SIGNATURE: file.read_bytes()}


def signer_for(
    export: Export,
    name: str,
    file: Path = Path(SIGNING_KEY_FILE),
    environment: MutableMapping[str, str] = os.environ,
) -> Signer | None:
    """What spec.export.signing asks for; raises StageError before anything is computed.

    From now on neither this thread nor what it starts can read the key: models may come with code.
    """
    former = environment.pop(FORMER_VARIABLE, "")
    if export.signing is None:
        return None
    if former and not file.exists():
        with _as_file(former) as pipe:
            return Signer(name, pipe)
    signer = Signer(name, file)
    if not child.deny_reading(file.parent):
        log.warning("This system has no Landlock: a model's own code could read %s", file)
    return signer


def _config(key: Path) -> signing.Config:
    try:
        from model_signing import signing  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise StageError(
            Reason.INVALID_CONFIG,
            "spec.export.signing needs the package model-signing, which this trainer image does "
            "not have: build it with EXTRAS that contain `signing`, or leave signing out.",
        ) from error
    try:
        # The package says that it is typed; its constructors are not.
        config = signing.Config()  # type: ignore[no-untyped-call]
        return config.use_elliptic_key_signer(private_key=key)
    except OSError as error:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"spec.export.signing is set, but {key} can't be read ({error.strerror}): name a "
            "Secret with a private key in spec.export.signing.keySecretRef.",
        ) from error
    except (AttributeError, TypeError, ValueError) as error:
        # Nothing of the library's message: it may quote the key.
        raise StageError(
            Reason.INVALID_CONFIG,
            "The key of spec.export.signing is not a private key of curve P-256, P-384 or P-521 "
            "in PEM without a password: make one with `openssl ecparam -name prime256v1 -genkey "
            "-noout`.",
        ) from error


@contextmanager
def _as_file(key: str) -> Iterator[Path]:
    """A path that the key can be read from once; it never lies on a disk."""
    reading, writing = os.pipe()
    try:
        os.write(writing, key.encode())
        os.close(writing)
        yield Path(f"/dev/fd/{reading}")
    finally:
        os.close(reading)


def _known(name: str, artifacts: Iterable[Artifact]) -> Any:
    """The hashes that model-signing would find by reading all files again."""
    from model_signing import hashing, manifest  # noqa: PLC0415

    kind = manifest.SerializationType.from_args(
        {
            "method": "files",
            "hash_type": "sha256",
            "allow_symlinks": False,
            "ignore_paths": NOT_SIGNED,
        }
    )

    class Known(hashing.Config):
        """Hashes that were taken when the files were written."""

        def hash(self, *_: object, **__: object) -> manifest.Manifest:
            digest = hashing.hashing.Digest  # type: ignore[attr-defined]
            items = [
                kind.new_item(item.path, digest("sha256", bytes.fromhex(item.sha256)))
                for item in artifacts
            ]
            return manifest.Manifest(name, items, kind)

    return Known()  # type: ignore[no-untyped-call]
