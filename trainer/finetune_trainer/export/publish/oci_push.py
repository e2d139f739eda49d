"""The push to a container registry: an image for each model, made without a container runtime.

A layer is an uncompressed tar archive, of one large file or of all small ones, below /models. It is
streamed from the disk twice, for its digest and to the registry. Names, order, owner, mode and time
are fixed, so that the same files have the same digests in each version and every run, and what the
registry has is not sent again. The index lists the same layers for each architecture, since
container runtimes refuse an image of another one.

python-dxf speaks to the registry: unlike oras-py it holds no layer in memory, and asks for a token
again where a request needs more rights than the one before.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import requests
from dxf import DXF, DXFBase
from dxf.exceptions import DXFAuthInsecureError, DXFError, DXFUnauthorizedError

from finetune_trainer.contract import (
    REGISTRY_FILE,
    Artifact,
    Export,
    ImageReference,
    Oci,
    Reason,
    StageError,
)
from finetune_trainer.contract.output import MODEL_FOLDERS
from finetune_trainer.runtime import child
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import Folder, OnBytes
from finetune_trainer.store.marker import PushedImages, describe_file, last_push, record_push
from finetune_trainer.store.versions import Version, image_files, version_name

MODELS = "models"
"""The folder in the image. KServe looks for a model there."""

LARGE = 64 << 20  # bytes; a file from here on is a layer of its own
CHUNK = 4 << 20
ANSWER_SECONDS = 600.0  # a registry may copy a layer before it answers
ARCHITECTURES = ("amd64", "arm64")
INDEX_DOCKER_HUB = "https://index.docker.io/v1/"  # its name in a configuration of Docker's
HOST_DOCKER_HUB = "registry-1.docker.io"

_OCI = "application/vnd.oci.image"
INDEX, MANIFEST = f"{_OCI}.index.v1+json", f"{_OCI}.manifest.v1+json"
CONFIG, LAYER = f"{_OCI}.config.v1+json", f"{_OCI}.layer.v1.tar"
_PACK = "application/vnd.cncf.model"
PACK_MANIFEST, PACK_CONFIG = f"{_PACK}.manifest.v1+json", f"{_PACK}.config.v1+json"
PACK_LAYER, PACK_PATH = f"{_PACK}.weight.v1.tar", "org.cncf.model.filepath"

_PASSING = {408, 425, 429}

log = logging.getLogger(__name__)


class Login(NamedTuple):
    user: str
    password: str


def read_login(oci: Oci | None, file: Path = Path(REGISTRY_FILE)) -> Login | None:
    """The registry's user and password, where the Secret has them; StageError if it can't be read.

    From now on neither this thread nor what it starts can read the file: models may come with code.
    """
    if oci is None or not file.exists():
        return None
    try:
        entries = json.loads(file.read_bytes())["auths"]
        found = _entry(entries, oci.repository)
        login = None if found is None else _login(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # Nothing of the error's message: it may quote the password.
        raise StageError(
            Reason.INVALID_CONFIG,
            "The Secret of spec.output.oci.secretRef is no registry's login: make one with "
            "`kubectl create secret docker-registry`.",
        ) from error
    if login is None:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"The Secret of spec.output.oci.secretRef has no login for {_host(oci.repository)}, "
            f"but for {', '.join(sorted(entries)) or 'nothing'}: add one, or correct "
            "spec.output.oci.repository.",
        )
    if not child.deny_reading(file.parent):
        log.warning("This system has no Landlock: a model's own code could read %s", file)
    return login


def _entry(entries: dict[str, Any], repository: str) -> dict[str, Any] | None:
    """The entry of the registry, or of the longest part of the path that has one of its own."""
    place = repository if _host(repository) != HOST_DOCKER_HUB else INDEX_DOCKER_HUB
    known = {_place(name): entry for name, entry in entries.items()}
    path = PurePosixPath(_place(place))
    return next((known[str(p)] for p in (path, *path.parents) if str(p) in known), None)


def _place(name: str) -> str:
    """An entry's name without the parts that say nothing."""
    return re.sub(r"^https?://|/(v[12]/?)?$", "", name)


def _login(entry: dict[str, Any]) -> Login:
    if entry.get("auth"):
        user, _, password = base64.b64decode(entry["auth"]).decode().partition(":")
        return Login(user, password)
    return Login(entry["username"], entry["password"])


def _host(repository: str) -> str:
    host = repository.partition("/")[0]
    return HOST_DOCKER_HUB if host in ("docker.io", "index.docker.io") else host


class TarLayer:
    """A tar archive of files that lie on this disk, made while it is read; it can be read again."""

    def __init__(self, files: Sequence[tuple[str, Path]]) -> None:
        """`files` are paths in the archive, each with its file."""
        self._files = sorted(files)
        self.on_bytes: OnBytes | None = None
        self._size = sum(len(part) for part in self._framed(lambda _: ()))
        self._size += sum(file.stat().st_size for _, file in self._files)

    def __len__(self) -> int:
        """Bytes: a request has a length by that, which some registries insist on."""
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        for part in self._framed(_chunks):
            if self.on_bytes:
                self.on_bytes(len(part))
            yield part

    def digest(self) -> str:
        found = hashlib.sha256()
        for part in self:
            found.update(part)
        return f"sha256:{found.hexdigest()}"

    def _framed(self, read: Callable[[Path], Iterator[bytes] | tuple[()]]) -> Iterator[bytes]:
        """The archive, with what `read` makes of each file."""
        folders = {str(each) for path, _ in self._files for each in PurePosixPath(path).parents}
        for folder in sorted(folders - {"."}):
            yield _header(folder, 0o755, tarfile.DIRTYPE)
        for path, file in self._files:
            length = file.stat().st_size
            yield _header(path, 0o644, tarfile.REGTYPE, length)
            yield from read(file)
            yield bytes(-length % tarfile.BLOCKSIZE)
        yield bytes(2 * tarfile.BLOCKSIZE)


def _header(path: str, mode: int, kind: bytes, length: int = 0) -> bytes:
    """Owner, group and time stay 0."""
    info = tarfile.TarInfo(path)
    info.mode, info.type, info.size = mode, kind, length
    return info.tobuf(tarfile.PAX_FORMAT)


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


class Blob(NamedTuple):
    """A layer that the registry has."""

    digest: str
    size: int
    path: str
    """Of the file in it, or the folder of several."""


def push_images(
    oci: Oci,
    export: Export,
    output: Folder,
    version: Version,
    *,
    workspace: Path,
    reporter: Reporter,
    login: Login | None = None,
) -> tuple[ImageReference, ...]:
    """Push the models of a version, unless that was done, and record them in the output folder.

    Files are fetched one layer at a time, and only these are on this disk. Raises StageError; the
    version is complete in any case.
    """
    wanted = PushedImages.wanted(oci, export, version.data)
    if done := last_push(output, wanted):
        return done.images
    with _errors(oci, output):
        client = DXF(
            _host(oci.repository),
            oci.repository.partition("/")[2],
            auth=_authenticator(login),
            insecure=oci.insecure,
            timeout=ANSWER_SECONDS,
        )
        with client:
            push = _ImagePush(oci, output, version, workspace, client)
            images = tuple(push.run(name, reporter) for name in wanted.contents)
    record_push(output, wanted.model_copy(update={"images": images}))
    for image in images:
        log.info("Pushed %s", image.reference)
    return images


def _authenticator(login: Login | None) -> Callable[[DXFBase, requests.Response], None]:
    user, password = login or (None, None)

    def authenticate(client: DXFBase, response: requests.Response) -> None:
        if login is None and "bearer" not in response.headers.get("www-authenticate", "").lower():
            raise DXFUnauthorizedError
        client.authenticate(user, password, response=response)

    return authenticate


class _ImagePush:
    def __init__(
        self, oci: Oci, output: Folder, version: Version, workspace: Path, client: DXF
    ) -> None:
        self._oci = oci
        self._output = output
        self._version = version
        self._workspace = workspace / "oci"
        self._client = client

    def run(self, name: str, reporter: Reporter) -> ImageReference:
        """Push one model."""
        files = image_files(self._version, name)
        if not files:
            raise StageError(
                Reason.INVALID_CONFIG,
                f"spec.output.oci.include names {name}, and version {self._version.name} has no "
                "such model: leave it out, or let spec.export write it.",
            )
        tag = f"{self._oci.tag or version_name(self._version.marker.fingerprint)}-{name}"
        what = f"Pushing {self._oci.repository}:{tag}"
        # Each byte is read for the digest first, and then to be sent.
        transfer = reporter.transfer(what, 2 * sum(item.bytes for item, _ in files))
        blobs = [self._push_layer(layer, transfer) for layer in _layers(files)]
        pack = self._oci.format == "modelPack"
        digest = self._push_pack(tag, name, blobs) if pack else self._push_image(tag, blobs)
        return ImageReference(name=name, reference=f"{self._oci.repository}:{tag}@{digest}")

    def _push_layer(self, files: Sequence[tuple[Artifact, str]], on_bytes: OnBytes) -> Blob:
        there = [(f"{MODELS}/{path}", self._fetch(item)) for item, path in files]
        layer = TarLayer(there)
        layer.on_bytes = on_bytes
        digest = layer.digest()
        self._client.push_blob(data=layer, digest=digest)
        for _, file in there:
            file.unlink()
        return Blob(digest, len(layer), there[0][0] if len(there) == 1 else MODELS)

    def _fetch(self, item: Artifact) -> Path:
        file, source = self._workspace / item.path, self._version.path(item.path)
        self._output.download(source, file)
        if describe_file(file, item.path).sha256 != item.sha256:
            raise StageError(
                Reason.STORAGE_UNAVAILABLE,
                f"{self._output.uri_of(source)} is not what manifest.json says: it is not "
                "pushed. Find out who or what has changed it; the next attempt tries again.",
            )
        return file

    def _push_image(self, tag: str, blobs: Sequence[Blob]) -> str:
        layers = [_descriptor(LAYER, blob.digest, blob.size) for blob in blobs]
        root = {"type": "layers", "diff_ids": [blob.digest for blob in blobs]}
        manifests = []
        for architecture in ARCHITECTURES:
            platform = {"os": "linux", "architecture": architecture}
            config = self._push_json(CONFIG, {**platform, "config": {}, "rootfs": root})
            data = _manifest(MANIFEST, config=config, layers=layers)
            self._client.set_manifest(_digest(data), data.decode())
            described = _descriptor(MANIFEST, _digest(data), len(data))
            manifests.append({**described, "platform": platform})
        return self._set(tag, _manifest(INDEX, manifests=manifests))

    def _push_pack(self, tag: str, name: str, blobs: Sequence[Blob]) -> str:
        layers = [
            _descriptor(PACK_LAYER, blob.digest, blob.size)
            | {"annotations": {PACK_PATH: blob.path}}
            for blob in blobs
        ]
        form = {"format": "gguf", "quantization": name}
        about = {
            "descriptor": {"name": self._oci.repository.rpartition("/")[2]},
            "modelfs": {"type": "layers", "diffIds": [blob.digest for blob in blobs]},
            "config": {"format": "safetensors"} if name in MODEL_FOLDERS else form,
        }
        config = self._push_json(PACK_CONFIG, about)
        data = _manifest(MANIFEST, artifactType=PACK_MANIFEST, config=config, layers=layers)
        return self._set(tag, data)

    def _push_json(self, kind: str, content: dict[str, Any]) -> dict[str, Any]:
        data = _encoded(content)
        self._client.push_blob(data=io.BytesIO(data), digest=_digest(data))
        return _descriptor(kind, _digest(data), len(data))

    def _set(self, tag: str, data: bytes) -> str:
        self._client.set_manifest(tag, data.decode())
        return _digest(data)


def _layers(files: Sequence[tuple[Artifact, str]]) -> Iterator[list[tuple[Artifact, str]]]:
    """The small files together, then each large one."""
    if small := [each for each in files if each[0].bytes < LARGE]:
        yield small
    yield from ([each] for each in files if each[0].bytes >= LARGE)


def _manifest(kind: str, **content: Any) -> bytes:
    return _encoded({"schemaVersion": 2, "mediaType": kind, **content})


def _descriptor(kind: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": kind, "digest": digest, "size": size}


def _encoded(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@contextmanager
def _errors(oci: Oci, output: Folder) -> Iterator[None]:
    """Turn errors of the registry into StageErrors. No password is in any of them."""
    host, whole = _host(oci.repository), f"The artifacts are complete in {output.uri}."
    try:
        yield
    except DXFAuthInsecureError as error:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{host} wants a password, which isn't sent without encryption: set "
            f"spec.output.oci.insecure to false. {whole}",
        ) from error
    except DXFUnauthorizedError as error:
        raise _refused(oci, 401, "", whole) from error
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        raise _refused(oci, status, _said(error.response), whole) from error
    except (requests.exceptions.SSLError, requests.exceptions.InvalidURL) as error:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{host} is no registry that speaks TLS with a certificate that is trusted here: name "
            "its certificates in spec.storage.caBundle, or set spec.output.oci.insecure for one "
            f"without encryption. {whole}",
        ) from error
    except requests.RequestException as error:
        raise _unreachable(oci, type(error).__name__, whole) from error
    except (DXFError, KeyError, ValueError) as error:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{host} doesn't answer as a registry ({type(error).__name__}): correct "
            f"spec.output.oci.repository. {whole}",
        ) from error


def _said(answer: requests.Response | None) -> str:
    """What the registry gives as its cause."""
    if answer is None:
        return ""
    try:
        return "; ".join(f"{e['code']}: {e.get('message', '')}" for e in answer.json()["errors"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


def _refused(oci: Oci, status: int, said: str, whole: str) -> StageError:
    cause = f"HTTP {status}" + (f", {said:.300}" if said else "")
    if status in (401, 403):
        return StageError(
            Reason.STORAGE_ACCESS_DENIED,
            f"The registry doesn't let the images into {oci.repository} ({cause}): the Secret of "
            "spec.output.oci.secretRef needs a login that may push there (`kubectl create secret "
            f"docker-registry`). {whole}",
        )
    if status in _PASSING or status >= 500:
        return _unreachable(oci, cause, whole)
    return StageError(
        Reason.INVALID_CONFIG,
        f"The registry refuses the push to {oci.repository} ({cause}): correct spec.output.oci. "
        f"{whole}",
    )


def _unreachable(oci: Oci, cause: str, whole: str) -> StageError:
    return StageError(
        Reason.STORAGE_UNAVAILABLE,
        f"The registry {_host(oci.repository)} can't take the images now ({cause}); the next "
        f"attempt sends what is missing. {whole}",
    )
