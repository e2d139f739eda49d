"""llama.cpp's quantizer at work, in a process of its own; it reads a QuantizeRequest.

An importance matrix says of each input of a matrix how large it is on real text, so that the
weights of large inputs are rounded more carefully. The file is GGUF, as llama.cpp's imatrix tool
writes it: for each matrix `NAME.in_sum2`, the sums of its squared inputs, and `NAME.counts`, of how
many tokens.
"""

from __future__ import annotations

import ctypes
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt

from finetune_trainer.contract import Quantization
from finetune_trainer.export.gguf import INPUT_COUNTS, INPUT_SUMS, QuantizeRequest
from finetune_trainer.runtime import child

_ERROR = 4  # ggml_log_level
_SIZE = re.compile(r"^size = +([0-9.]+) MiB")
_CHUNKS, _DATASETS = "imatrix.chunk_count", "imatrix.datasets"
_TEXT_BYTES = 127  # of an override's value, in llama.cpp


def main() -> None:
    request = QuantizeRequest.model_validate_json(sys.stdin.read())
    listener = listen(request.source.stat().st_size)
    llama_cpp.llama_log_set(listener, ctypes.c_void_p(0))
    options = llama_cpp.llama_model_quantize_default_params()
    prefix = "ALL" if request.kind is Quantization.F32 else "MOSTLY"
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{prefix}_{request.kind}")
    options.nthread = request.threads
    options.max_buf_size = request.buffer_bytes
    matrix = read_importance(request.importance) if request.importance else None
    if matrix:
        options.imatrix = matrix.data
        options.kv_overrides = matrix.notes
    status = llama_cpp.llama_model_quantize(
        str(request.source).encode(), str(request.target).encode(), ctypes.byref(options)
    )
    if status != 0:
        sys.exit("it could not be written or holds values that the type can't" if status else "")


def listen(total: int) -> Any:
    """A callback for llama.cpp's log. It reports sizes of tensors as progress, and errors."""
    done = 0.0

    def receive(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        nonlocal done
        said = text.decode(errors="replace")
        if size := _SIZE.match(said):
            done += float(size[1]) * 2**20
            child.say_progress(min(round(done), total), total)
        elif level == _ERROR:
            sys.stderr.write(said)

    return llama_cpp.llama_log_callback(receive)


@dataclass(frozen=True)
class ImportanceMatrix:
    data: Any
    """Array of llama_model_imatrix_data, the last one empty."""

    notes: Any
    """Array of llama_model_kv_override: how the file says that it used the matrix."""

    values: tuple[npt.NDArray[np.float32], ...]
    """The memory that `data` points to."""


def read_importance(file: Path) -> ImportanceMatrix:
    """Read an importance matrix; raises ValueError where the file is none."""
    reader = gguf.GGUFReader(file)
    tensors = {tensor.name: np.asarray(tensor.data, np.float32) for tensor in reader.tensors}
    names = sorted(name.removesuffix(INPUT_SUMS) for name in tensors if name.endswith(INPUT_SUMS))
    if missing := [name for name in names if name + INPUT_COUNTS not in tensors] or not names:
        raise ValueError(f"{file.name} is no importance matrix (counts are missing: {missing})")
    values = tuple(
        mean_squares(tensors[name + INPUT_SUMS], tensors[name + INPUT_COUNTS]) for name in names
    )
    data = (llama_cpp.llama_model_imatrix_data * (len(names) + 1))()
    for item, name, array in zip(data, names, values, strict=False):
        item.name = name.encode()
        item.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        item.size = array.size
    return ImportanceMatrix(data, _notes(file, reader, len(names)), values)


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


if __name__ == "__main__":
    main()
