"""Which files a dataset consists of: one, those of a folder, or those that fit a pattern."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from finetune_trainer.contract import Reason, StageError, Storage
from finetune_trainer.prepare.reading.record import names
from finetune_trainer.store import FileInfo, Folder, open_folder, split

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
