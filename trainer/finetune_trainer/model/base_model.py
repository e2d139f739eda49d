"""Where the base model is: its revision, its files, fetching them, and what the Hub's errors mean.

Only safetensors, JSON, tokenizer files and chat templates are read, never pickled weights; Python
code only when spec.model.trustRemoteCode allows it. The Hub's client reads HF_TOKEN and HF_ENDPOINT
from the environment. The token is in no message.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import httpx
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from finetune_trainer.contract import (
    MODEL_IMAGE,
    MODEL_IMAGE_FOLDER,
    Model,
    PreparedRunConfig,
    Reason,
    StageError,
    Storage,
    digest,
    is_mounted,
)
from finetune_trainer.model import ModelCache, ModelFolder, holds, size_of
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import (
    LocalFolder,
    OnBytes,
    open_folder,
    remove_old_partials,
    replacing,
)

CARD = "README.md"
"""Names the license. It changes no result, so it is no part of a folder's revision."""

_SMALL_FILES = {".json", ".jinja", ".model", ".tiktoken"}
# What tokenizers read beside them (merges.txt, vocab.txt); a licence's text changes no result.
_TOKENIZER_TEXT = re.compile(r"(bpe|dict|merges|token|vocab)[^/]*\.txt$", re.IGNORECASE)
HASHED_BYTES = 64 << 20
"""Mounted files up to this size are hashed whole. Larger ones, shards of hundreds of gigabytes
altogether, count by size and time of their last change."""


@dataclass(frozen=True)
class BaseModelFiles:
    """The files of a base model that count, at one revision."""

    model: Model
    revision: str
    """A digest over names, sizes and contents of the files that a result depends on."""

    sizes: dict[str, int]
    """Bytes of each file, by name."""

    commit: str | None = None
    """Commit of a Hub model, to download just these files."""

    def weights(self) -> list[str]:
        """The safetensors files."""
        return [name for name in self.sizes if name.endswith(".safetensors")]

    def small(self) -> list[str]:
        """Configuration, tokenizer and templates."""
        return [n for n in self.sizes if not n.endswith(".safetensors") and n != CARD]


def is_hub(source: str) -> bool:
    """Whether a model's source names a Hub repository rather than a folder."""
    return not source.startswith("s3://") and not is_mounted(source)


def find(model: Model, storage: Storage) -> BaseModelFiles:
    """Resolve the revision and list the files; reads no weights.

    Raises StageError: ModelNotFound, ModelAccessDenied, ModelUnsupported (no safetensors),
    ModelHubUnavailable, or the store's reasons.
    """
    model = _located(model)
    if is_hub(model.source):
        listing = list_repository(MODEL, model.source, model.revision)
    else:
        listing = _list_folder(model, storage)
    sizes = listing.sizes
    wanted = {name: size for name, size in sorted(sizes.items()) if _wanted(name, model)}
    if any(name.startswith("model") and name.endswith(".safetensors") for name in wanted):
        # Mistral's repositories hold the weights a second time, in another layout.
        wanted = {k: v for k, v in wanted.items() if not k.startswith("consolidated")}
    if "config.json" not in wanted:
        raise StageError(
            Reason.MODEL_NOT_FOUND if not sizes else Reason.MODEL_UNSUPPORTED,
            f"{model.source} holds no config.json, so it is not a transformers model: give "
            "org/name on the Hub, or the folder that save_pretrained wrote.",
        )
    if not any(name.endswith(".safetensors") for name in wanted):
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            f"{model.source} holds no safetensors weights (pickled .bin files are not loaded, for "
            "safety): convert it with save_pretrained, or choose a revision that has them.",
        )
    used = [[name, size, listing.mark(name)] for name, size in wanted.items() if name != CARD]
    return BaseModelFiles(model, f"sha256:{digest(used)}", wanted, listing.commit)


def fetch(
    files: BaseModelFiles, storage: Storage, target: Path, reporter: Reporter, *, weights: bool
) -> ModelFolder:
    """Bring the files to disk, without weights and card if so asked; returns their folder.

    A folder that is mounted is used as it is. Others stay in the cache for all jobs, if there is
    one; else a Hub model goes to its client's own.
    """
    model = files.model
    names = list(files.sizes) if weights else files.small()
    wanted = {name: files.sizes[name] for name in names}
    at_hand = Path(model.source) if is_mounted(model.source) else cached(files, wanted)
    if at_hand is not None:
        return ModelFolder(at_hand, model.trust_remote_code)
    moved = reporter.transfer(
        f"Fetching {'' if weights else 'the tokenizer of '}{model.source}", sum(wanted.values())
    )
    cache = ModelCache.found()
    cache = cache if cache is not None and cache.writable else None
    if is_hub(model.source):
        commit, root = files.commit or model.revision, cache.root if cache else None
        target = download_from_hub(MODEL, model.source, commit, names, moved, cache=root)
        return ModelFolder(target, model.trust_remote_code)
    folder = open_folder(model.source, storage)
    if cache is not None:
        target = cache.folder(files.revision)
        remove_old_partials(target)
    for name, size in wanted.items():
        if size_of(target / name) != size:  # downloads are whole or not there
            # In the cache also after the machine failed: its files are known by their size.
            with replacing(target / name, lasting=cache is not None) as partial:
                folder.download(name, partial, moved)
    return ModelFolder(target, model.trust_remote_code)


def cached(files: BaseModelFiles, wanted: Mapping[str, int]) -> Path | None:
    """The folder in the cache for all jobs that holds these files whole, if there is one."""
    cache = ModelCache.found()
    if cache is None:
        return None
    if not is_hub(files.model.source):
        folder: Path | None = cache.folder(files.revision)
    else:
        config = try_to_load_from_cache(
            files.model.source, "config.json", cache.root, files.commit or files.model.revision
        )
        folder = Path(config).parent if isinstance(config, str) else None
    return folder if folder is not None and holds(folder, wanted) else None


def stays_in_cache(files: BaseModelFiles) -> bool:
    """Whether none of the model's files end on the disk of a pod."""
    cache = ModelCache.found()
    return cache is not None and (cache.writable or cached(files, files.sizes) is not None)


def fetch_resolved(config: PreparedRunConfig, target: Path, reporter: Reporter) -> ModelFolder:
    """Bring the whole model to disk, in just the revision that `prepare` saw."""
    resolved, model = config.resolved, config.model
    if is_hub(model.source):
        commit = resolved.model_commit or resolved.model_revision  # as 0.1.0 resolved it
        model = model.model_copy(update={"revision": commit})
    files = find(model, config.model_storage)
    wanted = resolved.model_revision
    if files.revision != wanted and former_revision(files, config.model_storage) != wanted:
        raise StageError(
            Reason.MODEL_NOT_FOUND,
            f"The files in {model.source} are not those that `prepare` checked: somebody replaced "
            "them meanwhile, or the volume gives them another time of change at each mount. To "
            "start from the new ones, ask for another look (finetune.dev/retry-requested-at).",
        )
    return fetch(files, config.model_storage, target, reporter, weights=True)


def former_revision(files: BaseModelFiles, storage: Storage) -> str:
    """The revision that 0.1.0 gave these files."""
    return files.commit or former_folder_revision(files.model, storage)


@dataclass(frozen=True)
class Listing:
    """What lies where a model is, or an adapter."""

    sizes: dict[str, int]
    """Bytes of each file, by name."""

    mark: Callable[[str], str]
    """What changes with the content of a file."""

    commit: str | None = None


def _located(model: Model) -> Model:
    """The model; one that is an image, as the folder that it is mounted at."""
    if not model.source.startswith(MODEL_IMAGE):
        return model
    root = Path(MODEL_IMAGE_FOLDER)
    if not root.is_dir():
        raise StageError(
            Reason.MODEL_NOT_FOUND,
            f"{model.source} is not mounted at {root}: that takes the operator and Kubernetes 1.35 "
            "or newer (image volumes). Elsewhere name a folder, a bucket or the Hub.",
        )
    inside = root / "models"  # as export pushes a model, and as KServe looks for one
    at_root = (root / "config.json").exists() or not inside.is_dir()
    return model.model_copy(update={"source": str(root if at_root else inside)})


def _list_folder(model: Model, storage: Storage) -> Listing:
    folder = open_folder(model.source, storage)
    if isinstance(folder, LocalFolder) and not folder.root.is_dir():
        raise StageError(
            Reason.MODEL_NOT_FOUND,
            f"The folder {model.source} does not exist: mount it, or correct spec.model.source.",
        )
    found = [info for info in folder.list() if _wanted(info.path, model)]
    infos = [info for info in found if info.path != CARD]
    if not infos:
        raise StageError(
            Reason.MODEL_NOT_FOUND,
            f"There is no model in {model.source}: upload config.json, tokenizer and safetensors "
            "there, or correct spec.model.source.",
        )
    sizes = {info.path: info.size for info in found}
    if isinstance(folder, LocalFolder):
        root = folder.root
        mark = _mark_of_image if root.is_relative_to(MODEL_IMAGE_FOLDER) else _mark_of_mounted
        return Listing(sizes, lambda name: mark(root / name))
    return Listing(sizes, {info.path: info.etag for info in found}.__getitem__)


def _wanted(name: str, model: Model) -> bool:
    path = PurePosixPath(name)
    if len(path.parts) > 1:  # other formats and precisions often lie in subfolders
        return False
    if path.suffix == ".py":
        return model.trust_remote_code
    if path.suffix == ".txt":  # the code that comes with a model may read any
        return model.trust_remote_code or _TOKENIZER_TEXT.search(name) is not None
    return path.suffix in _SMALL_FILES or path.suffix == ".safetensors" or name == CARD


def _mark_of_mounted(file: Path) -> str:
    """SHA-256 of a file, or the nanosecond of a large one's last change."""
    status = file.stat()
    if status.st_size > HASHED_BYTES:
        return f"changed:{status.st_mtime_ns}"
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _mark_of_image(file: Path) -> str:
    """SHA-256 of a file, or of parts of a large one: in an image, times of change may be fixed."""
    if file.stat().st_size > HASHED_BYTES:
        return f"sampled:{_sampled_digest(file)}"
    return _mark_of_mounted(file)


def list_repository(read: HubRead, repository: str, revision: str) -> Listing:
    """The files at the commit that a branch, tag or commit stands for."""
    with hub_errors(read, repository, revision):
        info = HfApi().model_info(
            repository, revision=revision, files_metadata=True, timeout=LIST_SECONDS
        )
    commit = info.sha
    if commit is None:
        raise not_found(read, repository, revision)
    files = {file.rfilename: file for file in info.siblings or []}

    def mark(name: str) -> str:
        file = files[name]
        # A mirror may not tell; then each commit counts as another version.
        return (file.lfs.sha256 if file.lfs else file.blob_id) or commit

    return Listing({name: file.size or 0 for name, file in files.items()}, mark, commit)


def download_from_hub(
    read: HubRead,
    repository: str,
    commit: str,
    names: list[str],
    on_bytes: OnBytes | None = None,
    *,
    cache: Path | None = None,
) -> Path:
    """Download files of a commit into a cache, by default the Hub client's own; returns the folder
    they are in."""
    folder = Path()
    for name in names:
        with hub_errors(read, repository, commit):
            file = Path(hf_hub_download(repository, name, revision=commit, cache_dir=cache))
        if on_bytes:
            on_bytes(file.stat().st_size)
        folder = file.parent
    return folder


def read_hub_header(repository: str, commit: str, name: str) -> dict[str, Any]:
    """The header of a safetensors file; raises ValueError where it is none."""
    with hub_errors(MODEL, repository, commit):
        try:
            found = HfApi().parse_safetensors_file_metadata(repository, name, revision=commit)
        except SafetensorsParsingError as error:
            raise ValueError(str(error)) from error
    return {tensor: asdict(info) for tensor, info in found.tensors.items()}


# Of the revision that 0.1.0 gave a folder. It must stay as it was.
_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken", ".safetensors"}
_SAMPLES = 16
_SAMPLE_BYTES = 1 << 16


def former_folder_revision(model: Model, storage: Storage) -> str:
    """The digest over a folder's file names, sizes and ETags, in a bucket or on disk."""
    folder = open_folder(model.source, storage)
    infos = [info for info in folder.list() if _counted(info.path, model)]
    if isinstance(folder, LocalFolder):
        etags = {info.path: _sampled_digest(folder.root / info.path) for info in infos}
    else:
        etags = {info.path: info.etag for info in infos}
    return f"sha256:{digest([[info.path, info.size, etags[info.path]] for info in infos])}"


def _counted(name: str, model: Model) -> bool:
    path = PurePosixPath(name)
    if len(path.parts) > 1:
        return False
    return path.suffix in _SUFFIXES or (path.suffix == ".py" and model.trust_remote_code)


def _sampled_digest(file: Path) -> str:
    size = file.stat().st_size
    sha256 = hashlib.sha256()
    with file.open("rb") as stream:
        if size <= 2 * _SAMPLES * _SAMPLE_BYTES:
            sha256.update(stream.read())
        else:
            for number in range(_SAMPLES):
                stream.seek(number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                sha256.update(stream.read(_SAMPLE_BYTES))
    return sha256.hexdigest()


LIST_SECONDS = 20.0  # for the list of a repository's files


@dataclass(frozen=True)
class HubRead:
    """What is read, as messages name it, and the reasons of its errors."""

    noun: str
    source: str
    """The field that names the repository."""

    revision: str
    """Where a user writes the revision."""

    missing: Reason = Reason.MODEL_NOT_FOUND
    denied: Reason = Reason.MODEL_ACCESS_DENIED


MODEL = HubRead(
    noun="model",
    source="spec.model.source",
    revision="spec.model.revision",
)
INITIAL_ADAPTER = HubRead(
    noun="adapter",
    source="spec.training.initFrom.source",
    revision="spec.training.initFrom.revision",
)
DATASET = HubRead(
    noun="dataset",
    source="spec.dataset.source",
    revision="what follows the @",
    missing=Reason.DATASET_NOT_FOUND,
    denied=Reason.STORAGE_ACCESS_DENIED,
)


@contextmanager
def hub_errors(read: HubRead, repository: str, revision: str) -> Iterator[None]:
    """Turn the client's errors into StageErrors."""
    named = f"The {read.noun} {repository}"
    try:
        yield
    except GatedRepoError as error:
        raise StageError(
            read.denied,
            f"{named} is gated: accept its licence on its page on the Hub, and name a Secret with "
            "that account's token in spec.model.tokenSecretRef.",
        ) from error
    except RevisionNotFoundError as error:
        raise StageError(
            read.missing, f"{named} has no revision {revision!r}: correct {read.revision}."
        ) from error
    except RepositoryNotFoundError as error:
        raise not_found(read, repository, revision) from error
    except HFValidationError as error:
        raise StageError(
            Reason.INVALID_CONFIG, f"{repository!r} is no name of a Hub repository: write org/name."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.TransportError) as error:
        raise _unavailable(read, repository, type(error).__name__) from error
    except EntryNotFoundError as error:
        raise StageError(
            read.missing, f"A file of {repository} is missing at {revision}: {error}"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status not in (401, 403):
            raise _unavailable(read, repository, f"HTTP {status}") from error
        raise StageError(
            read.denied,
            f"The Hub refuses the {read.noun} {repository} (HTTP {status}): check the token in the "
            "Secret of spec.model.tokenSecretRef, and that its account may read it.",
        ) from error


def not_found(read: HubRead, repository: str, revision: str) -> StageError:
    """There is no such repository, as far as this token can tell."""
    return StageError(
        read.missing,
        f"The {read.noun} {repository} ({revision}) does not exist on the Hub, or it is private: "
        f"correct {read.source}, or name a Secret with a token that may read it in "
        "spec.model.tokenSecretRef.",
    )


def _unavailable(read: HubRead, repository: str, cause: str) -> StageError:
    return StageError(
        Reason.MODEL_HUB_UNAVAILABLE,
        f"The Hub can't be reached for the {read.noun} {repository} ({cause}): check the network "
        f"and HF_ENDPOINT, or put it into a bucket and name that in {read.source}.",
    )
