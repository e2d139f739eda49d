"""A base model's weights as they lie on disk: one safetensors file, or shards with an index.

The files are memory-mapped: a tensor costs no memory of the process's own until it is changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from finetune_trainer.outcome import Reason, StageError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a model."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: str
    """The file that it is in."""

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Stored:
    """A tensor of the base model: a view of the mapped file."""

    tensor: torch.Tensor
    shard: str


def read_checkpoint(folder: Path) -> dict[str, Stored]:
    """All tensors by name, in the order of the files; raises StageError(ModelUnsupported)."""
    if (folder / SINGLE).is_file():
        return _tensors(folder, SINGLE)
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    weight_map = _weight_map(folder / INDEX)
    found = {
        name: stored
        for shard in sorted(set(weight_map.values()))
        for name, stored in _tensors(folder, shard).items()
        if weight_map.get(name) == shard
    }
    if missing := sorted(set(weight_map) - set(found)):
        raise _unreadable(INDEX, f"it names {some(missing)}, which the files don't hold")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json; raises StageError(ModelUnsupported)."""
    try:
        return dict(json.loads((folder / CONFIG).read_bytes()))
    except FileNotFoundError as error:
        raise _unreadable(CONFIG, "it is missing") from error
    except (ValueError, TypeError) as error:
        raise _unreadable(CONFIG, f"it is no JSON object ({error})") from error


def open_file(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one safetensors file in its order; raises SafetensorError and OSError."""
    handle: Any = safe_open(file, framework="pt")
    return {name: handle.get_tensor(name) for name in handle.offset_keys()}


def some(names: Iterable[str], limit: int = 3) -> str:
    """A list of names for people: a few of them, and how many more there are."""
    listed = list(names)
    more = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {more} more" if more > 0 else "")


def _tensors(folder: Path, shard: str) -> dict[str, Stored]:
    try:
        opened = open_file(folder / shard)
    except FileNotFoundError as error:
        raise _unreadable(shard, "it is missing") from error
    except SafetensorError as error:
        raise _unreadable(shard, str(error)) from error
    return {name: Stored(tensor, shard) for name, tensor in opened.items()}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return {str(k): str(v) for k, v in json.loads(index.read_bytes())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(index.name, f"it is no index of shards ({error})") from error


def _unreadable(file: str, cause: str) -> StageError:
    return StageError(
        Reason.MODEL_UNSUPPORTED,
        f"The base model's {file} can't be read: {cause.rstrip('.'):.300}. Download or upload the "
        "base model again.",
    )


def _no_weights(folder: Path) -> StageError:
    pickled = sorted(f.name for f in folder.glob("*.bin")) if folder.is_dir() else []
    found = f"only {some(pickled)}, which could run code when read" if pickled else "none"
    return StageError(
        Reason.MODEL_UNSUPPORTED,
        f"The base model has no weights in safetensors ({SINGLE} or {INDEX}), {found}. Choose a "
        "revision with safetensors, or save the model again with transformers.",
    )
