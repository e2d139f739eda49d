"""llama.cpp's importance matrix: for each input of a matrix, how large it is on real text.

A quantization rounds the weights of large inputs more carefully. The file is GGUF, as llama.cpp's
imatrix tool writes it: for each matrix `NAME.in_sum2`, the sums of its squared inputs, and
`NAME.counts`, of how many tokens.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt

SUMS, COUNTS = ".in_sum2", ".counts"
_CHUNKS, _DATASETS = "imatrix.chunk_count", "imatrix.datasets"
_TEXT_BYTES = 127  # of an override's value, in llama.cpp


@dataclass(frozen=True)
class Matrix:
    """What llama_model_quantize takes."""

    data: Any
    """Array of llama_model_imatrix_data, the last one empty."""

    notes: Any
    """Array of llama_model_kv_override: how the file says that it used the matrix."""

    values: tuple[npt.NDArray[np.float32], ...]
    """The memory that `data` points to."""


def read(file: Path) -> Matrix:
    """Read an importance matrix; raises ValueError where the file is none."""
    reader = gguf.GGUFReader(file)
    tensors = {tensor.name: np.asarray(tensor.data, np.float32) for tensor in reader.tensors}
    names = sorted(name.removesuffix(SUMS) for name in tensors if name.endswith(SUMS))
    if missing := [name for name in names if name + COUNTS not in tensors] or not names:
        raise ValueError(f"{file.name} is no importance matrix (counts are missing: {missing})")
    values = tuple(mean_squares(tensors[name + SUMS], tensors[name + COUNTS]) for name in names)
    data = (llama_cpp.llama_model_imatrix_data * (len(names) + 1))()
    for item, name, array in zip(data, names, values, strict=False):
        item.name = name.encode()
        item.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        item.size = array.size
    return Matrix(data, _notes(file, reader, len(names)), values)


def mean_squares(
    sums: npt.NDArray[np.float32], counts: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Mean squared inputs, flat; 1 for an expert that no token reached."""
    rows = sums.reshape(counts.size, -1)
    count = counts.reshape(-1, 1)
    means = np.divide(rows, count, out=np.ones_like(rows), where=count > 0)
    return np.ascontiguousarray(means.ravel())


def _notes(file: Path, reader: Any, entries: int) -> Any:
    """The keys that llama.cpp's own quantizer leaves."""
    notes: list[tuple[str, int | str]] = [("quantize.imatrix.file", file.name)]
    if datasets := reader.get_field(_DATASETS):
        notes.append(("quantize.imatrix.dataset", str(datasets.contents(0))))
    notes.append(("quantize.imatrix.entries_count", entries))
    if chunks := reader.get_field(_CHUNKS):
        notes.append(("quantize.imatrix.chunks_count", int(chunks.contents())))
    array = (llama_cpp.llama_model_kv_override * (len(notes) + 1))()
    for item, (key, value) in zip(array, notes, strict=False):
        item.key = key.encode()
        if isinstance(value, int):
            item.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
            item.value.val_i64 = value
        else:
            item.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR
            item.value.val_str = value.encode()[:_TEXT_BYTES]
    return array
