"""llama.cpp's converter at work on the merged weights, in a process of its own."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from conversion.base import LazyTorchTensor  # type: ignore[import-not-found]

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.export.merge import MergedWeights, TensorInfo
from finetune_trainer.model import converter
from finetune_trainer.runtime import child

if TYPE_CHECKING:
    import torch

    from finetune_trainer.export.merge import MergedWeights


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


def raw(values: torch.Tensor) -> memoryview:
    """The bytes of a tensor."""
    return values.contiguous().view(-1).view(torch.uint8).numpy().data


def has_infinite(values: torch.Tensor) -> bool:
    """Whether a tensor in float16 has values that are not finite."""
    if values.dtype is not torch.float16 or not values.numel():
        return False
    low, high = torch.aminmax(values)  # many times faster than torch.isfinite
    return not (math.isfinite(low) and math.isfinite(high))


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


WAITING = 2
"""Blocks that may be ready before the one that is written."""


def main() -> None:
    """Do what standard input asks for."""
    request = json.load(sys.stdin)
    logging.basicConfig(level=logging.WARNING)
    # Its own gguf-py goes before the package of that name, which may be of another version.
    sys.path[:0] = [request["llama"], f"{request['llama']}/gguf-py"]
    try:
        write(request)
    except StageError as error:
        converter.refuse(error)


def write(request: dict[str, Any]) -> None:
    """Write the file that is asked for."""
    import torch  # noqa: PLC0415 - not before the path is set

    from finetune_trainer.export.merge import MergedWeights  # noqa: PLC0415 - imports torch

    torch.set_num_threads(request["threads"])
    adapter = request["adapter"]
    weights = MergedWeights.open(Path(request["base"]), Path(adapter) if adapter else None)
    model = build(request, weights)
    model.prepare_tensors()
    model.prepare_metadata(vocab_only=False)
    if not request["beginsWithBos"]:
        dont_add_bos(model.gguf_writer)
    write_file(model.gguf_writer, Path(request["target"]), request["threads"])


def build(request: dict[str, Any], weights: MergedWeights) -> Any:
    """The converter for the model's architecture, with tensors of the merged weights."""
    import gguf  # noqa: PLC0415 - not before the path is set
    from conversion import (  # type: ignore[import-not-found] # noqa: PLC0415
        ModelBase,
        ModelType,
        get_model_architecture,
        get_model_class,
    )

    pass

    folder = Path(request["folder"])
    parameters = ModelBase.load_hparams(folder, False)
    architecture = get_model_architecture(parameters, ModelType.TEXT)
    try:
        known = get_model_class(architecture)
    except NotImplementedError:
        sys.exit(f"Model {architecture} is not supported")

    class MergedModel(known):  # type: ignore[misc, valid-type] # the converter has no types
        model_arch = known.model_arch

        def index_tensors(self, remote_hf_model_id: str | None = None) -> dict[str, Any]:
            """Tensors by name, in the order of a single file, as the converter reads it."""
            del remote_hf_model_id
            tensors: dict[str, Callable[[], Any]] = {}
            for _, info in sorted(weights.infos.items()):
                kept = self.filter_tensors((info.name, partial(stored_tensor, weights, info)))
                if kept:
                    tensors[kept[0]] = kept[1]
            return tensors

    mostly = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}[request["type"]]
    kind = gguf.LlamaFileType[mostly]
    return MergedModel(folder, kind, Path(request["target"]), model_name=request["name"])


def dont_add_bos(writer: Any) -> None:
    """Let the file say that no token is put before a prompt; one that says nothing stays so."""
    import gguf  # noqa: PLC0415 - not before the path is set

    value = writer.kv_data[0].get(gguf.Keys.Tokenizer.ADD_BOS)
    if value is not None:
        value.value = False


def write_file(writer: Any, target: Path, threads: int) -> None:
    """Write head and tensors: threads compute the next blocks while this one writes."""
    import torch  # noqa: PLC0415 - not before the path is set

    writer.write_header_to_file(path=target)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    begin, total = file.tell(), sum(padded(writer, each) for each in writer.tensors[0].values())
    waiting: deque[Future[memoryview]] = deque()

    def write_next() -> None:
        file.write(waiting.popleft().result())
        child.say_progress(file.tell() - begin, total)

    # Each thread computes alone: torch's own threads wait for each other in each operation.
    with ThreadPoolExecutor(
        threads, "blocks", initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for block in blocks(writer):
            waiting.append(pool.submit(block))
            if len(waiting) > threads + WAITING:
                write_next()
        while waiting:
            write_next()
    if file.tell() - begin != total:
        sys.exit(f"the tensors have {file.tell() - begin} bytes instead of {total}")
    writer.close()


def blocks(writer: Any) -> Iterator[Callable[[], memoryview]]:
    """What computes the bytes of all tensors, in the order of the file."""
    pass

    for name, info in writer.tensors[0].items():
        tensor, info.tensor = info.tensor, None  # to be forgotten when it is written
        parts = tensor.blocks() if isinstance(tensor, BlockArray) else (partial(whole, tensor),)
        for part in parts:
            yield partial(exact_bytes, name, part)
        if rest := padded(writer, info) - info.nbytes:
            yield partial(padding, rest)


def padding(count: int) -> memoryview:
    """Zeros."""
    return memoryview(bytes(count))


def padded(writer: Any, info: Any) -> int:
    """Bytes that a tensor takes in the file."""
    return int(writer.ggml_pad(info.nbytes, writer.data_alignment))


def exact_bytes(name: str, block: Callable[[], torch.Tensor]) -> memoryview:
    """The bytes of a block; refuses what F16 can't hold, which would be infinite."""
    pass

    values = block()
    if has_infinite(values):
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            f"The model's {name} has values that F16 can't hold (its largest is 65,504): write "
            "BF16 instead of F16 in spec.export.gguf.",
        )
    return raw(values)


if __name__ == "__main__":
    main()
