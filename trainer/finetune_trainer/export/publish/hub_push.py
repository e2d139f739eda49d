"""The push to the Hugging Face Hub, in one commit: the public files of a version.

They keep their paths. Files of the last push that this one doesn't bring are deleted; what others
put into the repository stays.
The client resumes by itself: content that the Hub has is not sent again.

A bucket belongs to the team, a repository may be public. So the files are those of an allow-list,
and what says where the data lies, or quotes it, is left out or written anew:

    manifest.json                without buckets, samples and the dataset's columns
    SHA256SUMS, model.sig        of the files that go
    adapter/adapter_config.json  names a base model that is in a bucket without the bucket
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
)

from finetune_trainer.contract import (
    Artifact,
    Hub,
    PrivateFile,
    Reason,
    StageError,
    display_name,
)
from finetune_trainer.export.publish import SHA256SUMS, Sign, sha256sums
from finetune_trainer.model.base_model import is_hub
from finetune_trainer.runtime import Transfer
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import Folder
from finetune_trainer.store.marker import MANIFEST, PUSHED, Marker, Pushed, describe_file
from finetune_trainer.store.versions import Version, find_pushed

TOKEN_VARIABLE = "FINETUNE_HUB_TOKEN"  # noqa: S105 - its name
_PASSING = {408, 429}

log = logging.getLogger(__name__)


def check_token(hub: Hub | None, environment: Mapping[str, str] = os.environ) -> None:
    """Raise StageError for a push without a token, before anything is computed."""
    if hub and not environment.get(TOKEN_VARIABLE):
        raise StageError(
            Reason.INVALID_CONFIG,
            f"spec.output.hub is set, but {TOKEN_VARIABLE} is empty: name a Secret with a Hugging "
            "Face token in spec.output.hub.tokenSecretRef.",
        )


def push(
    hub: Hub,
    output: Folder,
    version: Version,
    workspace: Path,
    reporter: Reporter,
    *,
    sign: Sign | None = None,
) -> Pushed:
    """Push a version, unless that was done, and record it in the output folder.

    `sign` makes the signature of what is pushed, where the version has one. Files are fetched one
    at a time, so at most one of them is on this disk. Raises StageError; the version is complete in
    any case.
    """
    if done := find_pushed(output, hub, version):
        return done
    check_token(hub)
    listed = {item.path for item in select_files(hub, version)}
    config = output.read(version.path(ADAPTER_CONFIG)) if ADAPTER_CONFIG in listed else None
    files = public_files(hub, version, config, sign)
    total = sum(item.bytes for item in files.stored)
    transfer = reporter.transfer(f"Pushing {len(files.paths)} files to {hub.repo}", total)
    with _errors(hub, output):
        commit = _Push(hub, output, version, workspace).run(files, transfer)
    pushed = Pushed(
        repo=hub.repo,
        revision=hub.revision,
        manifest_sha256=hashlib.sha256(version.data).hexdigest(),
        commit=commit,
        include=tuple(map(str, hub.include)),
    )
    output.write(PUSHED, pushed.model_dump_json(indent=2).encode())
    log.info("Pushed to %s", commit)
    return pushed


class _Push:
    """One commit. huggingface_hub's upload_folder would make it of a folder with all files on this
    disk at once, some hundred gigabytes of a 70B model; here each large file comes from the store,
    is sent, and leaves again before the next one comes."""

    def __init__(self, hub: Hub, output: Folder, version: Version, workspace: Path) -> None:
        self._hub = hub
        self._output = output
        self._version = version
        self._workspace = workspace
        token = os.environ[TOKEN_VARIABLE]
        self._api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)

    def run(self, files: PublicFiles, transfer: Transfer) -> str:
        """Make the commit; returns its URL."""
        repo, revision = self._hub.repo, self._hub.revision
        self._api.create_repo(repo, private=self._hub.private, exist_ok=True)
        self._check_privacy()
        if revision != "main":
            self._api.create_branch(repo, branch=revision, exist_ok=True)
        stale = self._stale(files.paths)
        additions = [self._send(item, transfer) for item in files.stored]
        for path, data in files.written.items():
            additions.append(CommitOperationAdd(path, data))
            self._preupload(additions[-1])
        commit = self._api.create_commit(
            repo,
            [*additions, *(CommitOperationDelete(path) for path in stale)],
            commit_message="Artifacts of a fine-tuning",
            revision=revision,
        )
        return commit.commit_url

    def _check_privacy(self) -> None:
        if self._hub.private and not self._api.repo_info(self._hub.repo).private:
            raise StageError(
                Reason.INVALID_CONFIG,
                f"{self._hub.repo} exists and is public, and spec.output.hub.private is true: set "
                "it to false to publish the model, make the repository private, or name another.",
            )

    def _send(self, item: Artifact, transfer: Transfer) -> CommitOperationAdd:
        """Send a large file; a small one stays on the disk and goes with the commit."""
        file, source = self._workspace / "hub" / item.path, self._version.path(item.path)
        self._output.download(source, file)
        if describe_file(file, item.path).sha256 != item.sha256:
            raise StageError(
                Reason.STORAGE_UNAVAILABLE,
                f"{self._output.uri_of(source)} is not what manifest.json says: it is not "
                "pushed. Find out who or what has changed it; the next attempt tries again.",
            )
        operation = CommitOperationAdd(item.path, file)
        self._preupload(operation)
        if operation.path_or_fileobj == b"":  # freed, since the Hub has it
            file.unlink()
        transfer(item.bytes)
        return operation

    def _preupload(self, operation: CommitOperationAdd) -> None:
        self._api.preupload_lfs_files(
            self._hub.repo,
            [operation],
            revision=self._hub.revision,
            gitignore_content="",  # a .gitignore in the repository must not leave anything out
        )

    def _stale(self, present: set[str]) -> list[str]:
        """Files of the last push that are still in the repository, and not in this version."""
        try:
            file = self._api.hf_hub_download(
                self._hub.repo,
                MANIFEST,
                revision=self._hub.revision,
                local_dir=self._workspace / "hub-former",
            )
        except EntryNotFoundError:
            return []
        try:
            former = Marker.model_validate_json(Path(file).read_bytes()).files
        except ValueError:
            return []  # not ours
        paths = sorted({item.path for item in former} - present - {MANIFEST})
        if not paths:
            return []
        found = self._api.get_paths_info(self._hub.repo, paths, revision=self._hub.revision)
        return [info.path for info in found]


@contextmanager
def _errors(hub: Hub, output: Folder) -> Iterator[None]:
    """Turn errors of the Hub into StageErrors. The token is in none of them."""
    whole = f"The artifacts are complete in {output.uri}; the next attempt only pushes."
    try:
        with _unwrapped():
            yield
    except HFValidationError as error:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"spec.output.hub.repo {hub.repo!r} is no name of a Hub repository: write org/name.",
        ) from error
    except (httpx.TransportError, OfflineModeIsEnabled) as error:
        raise _unavailable(hub, type(error).__name__, whole) from error
    except HfHubHTTPError as error:
        raise _refused(hub, error, whole) from error


@contextmanager
def _unwrapped() -> Iterator[None]:
    """Unwrap errors with large files, which the client puts into a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__cause__, httpx.TransportError | HfHubHTTPError):
            raise error.__cause__ from None
        raise


def _refused(hub: Hub, error: HfHubHTTPError, whole: str) -> StageError:
    status = error.response.status_code
    if status in (401, 403, 404):
        return StageError(
            Reason.MODEL_ACCESS_DENIED,
            f"The Hub doesn't let the artifacts into {hub.repo}, branch {hub.revision} (HTTP "
            f"{status}): the token in the Secret of spec.output.hub.tokenSecretRef needs the right "
            f"to write there, and the account needs space. {whole}",
        )
    if status in _PASSING or status >= 500:
        return _unavailable(hub, f"HTTP {status}", whole)
    return StageError(
        Reason.INVALID_CONFIG,
        f"The Hub refuses the push to {hub.repo} (HTTP {status}: "
        f"{error.server_message or 'no message'}): correct spec.output.hub. {whole}",
    )


def _unavailable(hub: Hub, cause: str, whole: str) -> StageError:
    return StageError(
        Reason.MODEL_HUB_UNAVAILABLE,
        f"The Hub can't be reached for the push to {hub.repo} ({cause}): check the network and "
        f"HF_ENDPOINT. {whole}",
    )


# --- What others may read ---------------------------------------------------------------------

PUBLIC_FOLDERS = ("adapter/", "merged/", "merged-fp8/", "gguf/")
PUBLIC_FILES = ("Modelfile", "README.md")
ADAPTER_CONFIG = "adapter/adapter_config.json"
BASE_MODEL = "base_model_name_or_path"

_TOP = ("stage", "fingerprint", "version", "created", "metrics")
_LINEAGE = (
    *("datasetRows", "evalRows", "model", "modelRevision", "modelCommit"),
    *("hyperparameters", "fingerprints", "versions"),
)
_GATE = ("rows", "tokens", "heldOut", "basePerplexity", "tunedPerplexity")


@dataclass(frozen=True)
class PublicFiles:
    """Files of a version that go as they are, and those that are written for the Hub."""

    stored: tuple[Artifact, ...]
    written: dict[str, bytes] = field(default_factory=dict)

    @property
    def paths(self) -> set[str]:
        return {item.path for item in self.stored} | self.written.keys()


def select_files(hub: Hub, version: Version) -> list[Artifact]:
    """The files of the version that go to the Hub in some form."""
    named = {*PUBLIC_FILES, *hub.include}
    return [
        item
        for item in version.marker.files
        if item.path in named or item.path.startswith(PUBLIC_FOLDERS)
    ]


def public_files(
    hub: Hub, version: Version, adapter_config: bytes | None, sign: Sign | None
) -> PublicFiles:
    """What a push brings; `adapter_config` is adapter/adapter_config.json as it is in the bucket.

    `sign` makes the signature of these files, where the version has one.
    """
    chosen = select_files(hub, version)
    written: dict[str, bytes] = {}
    if adapter_config is not None and (changed := _without_location(adapter_config)):
        written[ADAPTER_CONFIG] = changed
    stored = [item for item in chosen if item.path not in {*written, SHA256SUMS, MANIFEST}]
    written[SHA256SUMS] = sha256sums(_listed(stored, written))
    listed = _listed(stored, written)
    signature = sign(listed) if sign else {}
    written |= signature
    if PrivateFile.MANIFEST in hub.include:
        written[MANIFEST] = version.data
    else:
        written[MANIFEST] = public_manifest(version.data, _listed(stored, written))
    return PublicFiles(tuple(stored), written)


def public_manifest(data: bytes, files: Iterable[Artifact]) -> bytes:
    """manifest.json for the Hub: figures and names of what is there, and no place or row."""
    whole = json.loads(data)
    lineage = _only(whole.get("lineage") or {}, _LINEAGE)
    if not is_hub(lineage.get("model", "")):
        lineage["model"] = display_name(lineage["model"])
    lineage["hyperparameters"] = _without_places(lineage.get("hyperparameters", {}))
    public = {
        **_only(whole, _TOP),
        "files": [item.model_dump(mode="json", by_alias=True, exclude_none=True) for item in files],
        "lineage": lineage,
        "gate": _only(whole.get("gate") or {}, _GATE),
    }
    return json.dumps(public, indent=2, ensure_ascii=False).encode() + b"\n"


def _only(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _without_places(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings but for those that name a place."""
    return {
        name: _without_places(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if not (isinstance(value, str) and not is_hub(value))
    }


def _without_location(adapter_config: bytes) -> bytes | None:
    """adapter_config.json with the base model's name in place of its URI; None: it has none."""
    config = json.loads(adapter_config)
    base = config.get(BASE_MODEL)
    if not isinstance(base, str) or is_hub(base):
        return None
    changed = {**config, BASE_MODEL: display_name(base)}
    return json.dumps(changed, indent=2, ensure_ascii=False).encode()


def _listed(stored: Iterable[Artifact], written: Mapping[str, bytes]) -> tuple[Artifact, ...]:
    """All files as a manifest lists them."""
    made = [
        Artifact(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for path, data in written.items()
    ]
    return (*stored, *made)
