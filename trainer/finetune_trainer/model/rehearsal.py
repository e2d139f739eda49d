"""The conversion to GGUF, rehearsed before any weights are fetched.

A safetensors file begins with the names, types and shapes of its tensors. That beginning, followed
by a hole of the right size, stands in for the file: llama.cpp's converter reads values only when it
writes them, and a dry run writes nothing. So all that it may not know shows within seconds: the
architecture, the tokenizer, a tensor. What it knows of the tokenizer is then asked of llama.cpp.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from finetune_trainer.contract import Reason, StageError, Storage
from finetune_trainer.model import converter, hub
from finetune_trainer.model.converter import gguf_name
from finetune_trainer.model.source import ModelFiles, is_hub
from finetune_trainer.store import Folder, open_folder

WORKER = "finetune_trainer.model.rehearsal_worker"
LENGTH_BYTES = 8  # the header's length comes first, little-endian
FIRST_BYTES = 1 << 18  # holds the header of most files
MAX_HEADER = 100_000_000  # safetensors' own limit
CONNECTIONS = 8
METADATA = "__metadata__"

Header = dict[str, Any]
"""Of a safetensors file: dtype, shape and data_offsets of each tensor by its name."""

Headers = dict[str, Header]
"""Headers by file."""


def rehearse(
    folder: Path, name: str, target: Path, texts: Sequence[str], *, trust_remote_code: bool = False
) -> list[list[int]]:
    """Convert a model, whose weights may be stand-ins; how llama.cpp then splits texts into tokens.

    The file `target` gets configuration and vocabulary. Raises StageError(ModelUnsupported) where
    llama.cpp can't do it.
    """
    with converter.shown(folder, "model", trusted=trust_remote_code) as view:
        request = {
            "llama": str(converter.llama_folder()),
            "folder": str(view),
            "name": gguf_name(name, folder),
            "target": str(target),
            "texts": list(texts),
        }
        command = [sys.executable, "-m", WORKER]
        said = converter.run(command, json.dumps(request), trusted=trust_remote_code)
    tokens: list[list[int]] = json.loads(said)["tokens"]
    return tokens


def with_stand_ins(files: ModelFiles, headers: Headers, small: Path, target: Path) -> Path:
    """Fill the folder `target` with links to the files in `small`, and a stand-in of each weight.

    A mounted folder, which has its weights, is returned as it is.
    """
    if files.model.source.startswith("/"):
        return small
    target.mkdir(parents=True)
    for name in files.small():
        (target / name).symlink_to((small / name).resolve())
    for name, header in headers.items():
        write_stand_in(header, target / name)
    return target


def write_stand_in(header: Header, target: Path) -> None:
    """A safetensors file whose values are a hole: it has its size, and takes no room."""
    text = json.dumps(header).encode()
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != METADATA]
    with target.open("wb") as stream:
        stream.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        stream.truncate(stream.tell() + max(ends, default=0))


def read_headers(files: ModelFiles, storage: Storage) -> Headers:
    """The headers of all weights; raises StageError(ModelUnsupported) and the store's reasons."""
    names = files.weights()
    with ThreadPoolExecutor(CONNECTIONS, "headers") as pool:
        return dict(zip(names, pool.map(lambda n: _header(files, storage, n), names), strict=True))


def tensor_names(headers: Headers) -> list[str]:
    """The names of all tensors."""
    return [name for header in headers.values() for name in header if name != METADATA]


def _header(files: ModelFiles, storage: Storage, name: str) -> Header:
    source = files.model.source
    try:
        if is_hub(source):
            return hub.read_header(source, files.revision, name)
        return _parsed(open_folder(source, storage), name)
    except (ValueError, AttributeError) as error:
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            f"{name} of {source} is no safetensors file: upload the model again, or correct "
            "spec.model.source.",
        ) from error


def _parsed(folder: Folder, name: str) -> Header:
    start = folder.read_start(name, FIRST_BYTES)
    end = LENGTH_BYTES + int.from_bytes(start[:LENGTH_BYTES], "little")
    if len(start) < end <= MAX_HEADER:
        start = folder.read_start(name, end)
    return dict(json.loads(start[LENGTH_BYTES:end]).items())
