"""The revision that 0.1.0 gave a model's folder, so that what it trained is found again.

Frozen: it must stay as it was. Large files on disk were sampled.
"""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

from finetune_trainer.contract import Model, Storage, digest
from finetune_trainer.store import LocalFolder, open_folder

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
