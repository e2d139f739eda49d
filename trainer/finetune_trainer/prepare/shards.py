"""Which files a dataset consists of: one, those of a folder or a pattern, or those of the Hub.

A dataset on the Hugging Face Hub is pinned to a commit. A file's ETag is the Hub's id of its
content, so that a commit that changes the README alone changes nothing.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from huggingface_hub import HfApi, hf_hub_download

from finetune_trainer.contract import HUB_DATASETS, Reason, StageError, Storage
from finetune_trainer.model.base_model import DATASET, LIST_SECONDS, hub_errors
from finetune_trainer.prepare.reading.record import names
from finetune_trainer.store import FileInfo, Folder, OnBytes, open_folder, split

MOST = 10_000  # files that are read as one dataset
_WILD = re.compile(r"[*?\[]")
_DATA = re.compile(
    r"\.((csv|tsv|txt|json|jsonl|ndjson)(\.(gz|bz2|xz|zst))?|parquet|zip)$", re.IGNORECASE
)


def is_pattern(uri: str) -> bool:
    """Whether a URI or path may stand for several files."""
    return uri.endswith("/") or bool(_WILD.search(uri))


def is_data(path: str) -> bool:
    """Whether a file is one of examples by its name; Spark and others leave `_SUCCESS` behind."""
    return not PurePosixPath(path).name.startswith((".", "_")) and bool(_DATA.search(path))


def fits(path: str, pattern: str) -> bool:
    """Whether a path fits a pattern: `*` stays within a folder, `**` is any folders or none."""
    return _fits(pattern.split("/"), path.split("/"))


def _fits(pattern: Sequence[str], path: Sequence[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_fits(pattern[1:], path[skipped:]) for skipped in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _fits(pattern[1:], path[1:])


def find_shards(uri: str, field: str, storage: Storage) -> tuple[Folder, list[FileInfo]]:
    """The files of a folder or pattern in the order of their names; raises DatasetNotFound."""
    parent, pattern = _split_pattern(uri)
    folder = open_folder(parent, storage)
    literal = _WILD.split(pattern, maxsplit=1)[0]
    listed = [info for info in folder.list(literal) if fits(info.path, pattern or "*")]
    chosen = listed if pattern else [info for info in listed if is_data(info.path)]
    if len(chosen) > MOST:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{uri} stands for {len(chosen):,} files, more than {MOST:,}: write larger ones, or "
            f"name fewer in {field}.",
        )
    if not chosen:
        raise _nothing(uri, field, (info.path for info in listed))
    return folder, [_with_etag(folder, info) for info in chosen]


def _split_pattern(uri: str) -> tuple[str, str]:
    """The folder that a pattern begins in, and the rest; "" where all of a folder is meant."""
    wild = _WILD.search(uri)
    if wild is None:
        return split(uri)[0] if uri.startswith("s3://") else uri.rstrip("/") or "/", ""
    start = uri.rfind("/", 0, wild.start()) + 1
    if uri.startswith("s3://") and start <= len("s3://"):
        raise StageError(Reason.INVALID_CONFIG, f"{uri!r}: a bucket's name can be no pattern.")
    return uri[:start].rstrip("/") or "/", uri[start:].rstrip("/")


def _with_etag(folder: Folder, info: FileInfo) -> FileInfo:
    """The file with its ETag, which the listing of a folder on disk lacks."""
    return info if info.etag else folder.stat(info.path) or info


def _nothing(uri: str, field: str, others: Iterable[str]) -> StageError:
    found = list(others)
    there = f"; it holds {names(found)}" if found else ""
    return StageError(
        Reason.DATASET_NOT_FOUND,
        f"There are no CSV, JSON lines or Parquet files at {uri}{there}. Upload them there, or "
        f"correct {field} (a pattern such as **/*.parquet looks into folders below).",
    )


_SOURCE = re.compile(
    r"hf://datasets/(?P<repository>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)
_WORD = r"(?:^|[/._ -])(?:{})(?=$|[/._ -]|\d)"
_TRAIN = re.compile(_WORD.format("train|training"), re.IGNORECASE)
_OTHER_SPLITS = re.compile(
    _WORD.format("test|testing|validation|valid|val|dev|eval|evaluation"), re.IGNORECASE
)
_SHARD = re.compile(r"[-_.]?\d+(?:-of-\d+)?(?:-[0-9a-f]{8,})?(?=\.|$)")


@dataclass(frozen=True)
class HubDataset:
    """Files of a dataset's repository at one commit."""

    repository: str
    commit: str
    infos: dict[str, FileInfo]

    def uri_of(self, path: str) -> str:
        """The full name of a file, with the commit."""
        return f"{HUB_DATASETS}{self.repository}@{self.commit}/{path}"

    def stat(self, path: str) -> FileInfo | None:
        """Size and ETag, which stay as they are at a commit."""
        return self.infos.get(path)

    def download(self, path: str, target: Path, on_bytes: OnBytes | None = None) -> None:
        """Copy a file to disk, as a whole or not at all."""
        beside = target.with_name(f"{target.name}.hub")
        with hub_errors(DATASET, self.repository, self.commit):
            file = hf_hub_download(
                self.repository, path, repo_type="dataset", revision=self.commit, local_dir=beside
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        Path(file).replace(target)
        shutil.rmtree(beside)
        if on_bytes:
            on_bytes(target.stat().st_size)


def find_hub_dataset(uri: str, field: str) -> tuple[HubDataset, list[FileInfo]]:
    """The files that a URI of a Hub's dataset names, in the order of their names.

    Raises StageError: InvalidConfig, DatasetNotFound, StorageAccessDenied, ModelHubUnavailable.
    """
    match = _SOURCE.fullmatch(uri)
    if match is None:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{field}: {uri!r} is no dataset on the Hub: write hf://datasets/org/name, with "
            "@revision and /path if wanted.",
        )
    revision = unquote(match["revision"] or "main")
    hub = _list(match["repository"], revision)
    paths = _chosen(sorted(hub.infos), match["path"] or "", uri, field)
    return hub, [hub.infos[path] for path in paths]


def _list(repository: str, revision: str) -> HubDataset:
    with hub_errors(DATASET, repository, revision):
        info = HfApi().dataset_info(
            repository, revision=revision, files_metadata=True, timeout=LIST_SECONDS
        )
    commit = str(info.sha)
    found = {}
    for file in info.siblings or []:
        etag = f"sha256:{file.lfs.sha256}" if file.lfs else f"git:{file.blob_id or commit}"
        found[file.rfilename] = FileInfo(file.rfilename, file.size or 0, etag)
    return HubDataset(repository, commit, found)


def _chosen(paths: list[str], wanted: str, uri: str, field: str) -> list[str]:
    """The files that a path in the repository names: a file, a pattern, or the rows of a folder."""
    if wanted in paths:
        return [wanted]
    if wanted and is_pattern(wanted) and not wanted.endswith("/"):
        chosen = [path for path in paths if fits(path, wanted)]
    else:
        folder = f"{wanted.rstrip('/')}/" if wanted else ""
        chosen = _train_split([p for p in paths if p.startswith(folder)], uri, field)
    if not chosen:
        data = [path for path in paths if is_data(path)]
        there = f"it has {names(data)}" if data else "it has no CSV, JSON lines or Parquet files"
        raise StageError(
            Reason.DATASET_NOT_FOUND, f"There is no such file at {uri}; {there}. Correct {field}."
        )
    return chosen


def _train_split(paths: list[str], uri: str, field: str) -> list[str]:
    """The files to train on, by the names that datasets on the Hub have."""
    data = [path for path in paths if is_data(path)]
    chosen = [path for path in data if _TRAIN.search(path)]
    if not chosen and any(_OTHER_SPLITS.search(path) for path in data):
        raise _ambiguous(uri, field, "has no split that is named train", data)
    chosen = chosen or data
    kinds = {_kind(path): path for path in reversed(chosen)}
    if len(kinds) > 1:
        raise _ambiguous(uri, field, "could mean several sets of files", list(kinds.values()))
    return chosen


def _kind(path: str) -> tuple[str, str]:
    """Folder and name without a shard's number: what files that belong together share."""
    file = PurePosixPath(path)
    return str(file.parent), _SHARD.sub("", file.name, count=1)


def _ambiguous(uri: str, field: str, why: str, files: Sequence[str]) -> StageError:
    return StageError(
        Reason.DATASET_NOT_FOUND,
        f"{uri} {why}: {names(sorted(files))}. Name the one in {field}, as "
        "hf://datasets/org/name/folder/file.parquet or with a pattern.",
    )
