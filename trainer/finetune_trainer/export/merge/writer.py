"""The merged model as safetensors on disk, written block by block in the base's shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from finetune_trainer.export.merge.checkpoint import INDEX, SINGLE, TensorInfo
from finetune_trainer.export.merge.merged import MergedWeights
from finetune_trainer.store import OnBytes
from finetune_trainer.store.local import replacing

BLOCK_BYTES = 8 << 20  # of rows that are written at a time
READABLE = 0o644  # for other users as well, whatever the umask
_ALIGNMENT = 8  # of the values' beginning, as the safetensors library has it

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
"""The format's names of the types that a merged model can hold."""


def write_merged(weights: MergedWeights, target: Path, on_bytes: OnBytes | None = None) -> None:
    """Write shards, and their index where there are several, to the folder `target`.

    `on_bytes` hears how many bytes were written since it was last called. A shard appears under
    its name when it is complete, and the index when all shards are.
    """
    shards: dict[str, list[TensorInfo]] = {}
    for info in weights.infos.values():
        shards.setdefault(info.shard, []).append(info)
    for shard, infos in shards.items():
        with replacing(target / shard) as partial, partial.open("wb") as file:
            partial.chmod(READABLE)
            _write_shard(weights, infos, file, on_bytes or (lambda _: None))
    if set(shards) != {SINGLE}:
        with replacing(target / INDEX) as partial:
            partial.write_text(json.dumps(_index(weights), indent=2, sort_keys=True) + "\n")
            partial.chmod(READABLE)


def _write_shard(
    weights: MergedWeights, infos: list[TensorInfo], file: BinaryIO, on_bytes: OnBytes
) -> None:
    # The widest types come first, so that every tensor begins at a multiple of its type's size.
    infos = sorted(infos, key=lambda info: -info.dtype.itemsize)
    head = _header(infos)
    file.write(head)
    on_bytes(len(head))
    for info in infos:
        for start, stop in _blocks(info):
            # No name for the rows: they would stay while the next ones are computed.
            on_bytes(file.write(_bytes(weights.rows(info.name, start, stop))))


def _header(infos: list[TensorInfo]) -> bytes:
    """Its own length in eight bytes, then JSON, padded with spaces."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for info in infos:
        begin, end = end, end + info.nbytes
        entries[info.name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _blocks(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """Rows of about BLOCK_BYTES."""
    rows = info.shape[0] if info.shape else 1
    size = max(1, BLOCK_BYTES * rows // max(1, info.nbytes))
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _index(weights: MergedWeights) -> dict[str, Any]:
    """The index as transformers writes it."""
    infos = weights.infos.values()
    return {
        "metadata": {
            "total_parameters": sum(torch.Size(info.shape).numel() for info in infos),
            "total_size": sum(info.nbytes for info in infos),
        },
        "weight_map": {info.name: info.shard for info in infos},
    }
