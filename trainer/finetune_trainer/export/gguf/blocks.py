"""Tensors of the merged model as llama.cpp's converter handles them, written block by block.

The converter describes what becomes of a tensor as a graph of operations, and computes it when the
tensor is written: whole, in float32, 2 GB for the embedding of an 8-billion Llama. Most of these
operations only move values: slices, views, permutations. Here these work on the 16-bit values, of
which most are a view of the base model's file, and float32 is made of a block of rows at a time.
What computes with the values (a norm's plus one) is left to the converter.

For the process in which the converter runs only (convert_worker): it imports its modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from threading import Lock
from typing import Any

import gguf
import numpy as np
import torch
from conversion.base import LazyTorchTensor  # type: ignore[import-not-found]

from finetune_trainer.export.merge import MergedWeights, TensorInfo

BLOCK_VALUES = 1 << 20
"""Values of a tensor that are in memory at a time: 4 MiB in float32."""

Rows = Callable[[int, int], torch.Tensor]
"""Rows from start to stop of a matrix."""

_MOVES = (
    "chunk",
    "contiguous",
    "flatten",
    "movedim",
    "narrow",
    "permute",
    "reshape",
    "split",
    "squeeze",
    "swapaxes",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
)
"""Methods of a tensor that only move its values."""

_TYPES = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}


class StoredTensor(LazyTorchTensor):  # type: ignore[misc] # the converter has no types
    """A tensor that is kept in 16 bits, and that says it is `dtype`: the same or float32."""

    _tensor_type = torch.Tensor

    def __init__(self, stored: Any, dtype: torch.dtype, rows: Rows | None = None) -> None:
        """`stored` is the converter's lazy tensor in 16 bits; `rows` reads it where it is whole."""
        meta = self.meta_with_dtype_and_shape(dtype, stored.shape)
        super().__init__(meta=meta, args=(stored,), func=lambda values: values.to(dtype))
        self.stored = stored
        self.rows = rows

    @classmethod
    def _wrap_fn(cls, fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """What computes with the values gives the converter's own kind of tensor."""
        wrapped: Callable[..., Any] = LazyTorchTensor._wrap_fn(fn, **options)
        return wrapped

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """To float32, which holds each 16-bit value; other types are computed."""
        if args == (torch.float32,) and not kwargs:
            return StoredTensor(self.stored, torch.float32, self.rows)
        return self._wrap_fn(lambda tensor: tensor.to(*args, **kwargs), use_self=self)()

    def float(self) -> Any:
        """As to(torch.float32)."""
        return self.to(torch.float32)

    def moved(self, result: Any) -> Any:
        """What a move of the 16-bit values gave, as a tensor of this type."""
        if isinstance(result, tuple):
            return tuple(self.moved(each) for each in result)
        return StoredTensor(result, self.dtype)

    def numpy(self) -> BlockArray:
        """What the converter chooses a type for and writes."""
        dtype = self._dtype_map[self.dtype]
        return BlockArray(self.rows or _computed(self.stored), tuple(self.shape), dtype, self.dtype)


def _move(name: str) -> Callable[..., Any]:
    def method(self: StoredTensor, *args: Any, **kwargs: Any) -> Any:
        return self.moved(getattr(self.stored, name)(*args, **kwargs))

    return method


# Afterwards, since the converter's metaclass puts its own there.
for _name in (*_MOVES, "__getitem__"):
    setattr(StoredTensor, _name, _move(_name))
StoredTensor.T = property(lambda self: self.moved(self.stored.T))


class BlockArray(gguf.LazyChunkedTensor):  # type: ignore[misc, name-defined] # has no types
    """A matrix of some type, whose rows are read and converted when it is written."""

    def __init__(
        self, rows: Rows, shape: tuple[int, ...], dtype: Any, written: torch.dtype
    ) -> None:
        super().__init__([], shape, dtype)
        self._rows = rows
        self._written = written
        self._values_shape = shape

    def quantize(self, qtype: Any) -> BlockArray:
        """The same rows, to be written as F32, F16 or BF16."""
        sized = super().quantize(qtype)
        array = BlockArray(self._rows, self._values_shape, sized.dtype, _TYPES[qtype])
        array.shape = sized.shape
        return array

    def blocks(self) -> Iterator[Callable[[], torch.Tensor]]:
        """What computes the values as they are written, in the order of the file."""
        count = self._values_shape[0] if self._values_shape else 1
        width = max(1, math.prod(self._values_shape) // max(1, count))
        step = max(1, BLOCK_VALUES // width)
        for start in range(0, count, step):
            yield partial(self._block, start, min(start + step, count))

    def _block(self, start: int, stop: int) -> torch.Tensor:
        return self._rows(start, stop).to(self._written)

    def tofile(self, *_: Any) -> None:
        """The converter's own writer would write block after block."""
        raise NotImplementedError


def stored_tensor(weights: MergedWeights, info: TensorInfo) -> Any:
    """A tensor of the merged model, to be read when it is written."""

    def rows(start: int, stop: int) -> torch.Tensor:
        return weights.rows(info.name, start, stop)

    meta = LazyTorchTensor.meta_with_dtype_and_shape(info.dtype, info.shape)
    stored = LazyTorchTensor(meta=meta, args=(info.name,), func=weights.rows)
    if info.dtype not in (torch.float16, torch.bfloat16):
        return stored
    return StoredTensor(stored, info.dtype, rows)


def whole(tensor: Any) -> torch.Tensor:
    """The values of a tensor that the converter computes itself."""
    return torch.from_numpy(np.ascontiguousarray(gguf.LazyNumpyTensor.to_eager(tensor)))


def _computed(stored: Any) -> Rows:
    """Rows of a tensor that has to be in memory as a whole, in 16 bits, for as long as it is read.

    It is forgotten with its last row.
    """
    found: list[torch.Tensor] = []
    lock = Lock()

    def rows(start: int, stop: int) -> torch.Tensor:
        with lock:
            if not found:
                found.append(LazyTorchTensor.to_eager(stored))
        return found[0][start:stop]

    return rows
