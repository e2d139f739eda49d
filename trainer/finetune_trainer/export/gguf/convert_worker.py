"""llama.cpp's converter at work on the merged weights, in a process of its own.

A JSON request on standard input:

    {"llama": folder of the converter, "base": …, "adapter": … or null, "folder": …,
     "target": …, "type": "F16" | "BF16" | "F32", "name": …, "beginsWithBos": …, "threads": …}

The converter reads configuration and tokenizer from `folder` and asks for its tensors by name; they
come from base and adapter, with the adapter's delta added as each is written.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_trainer.base_model import child, converter
from finetune_trainer.outcome import Reason, StageError

if TYPE_CHECKING:
    import torch

    from finetune_trainer.export.weights import MergedWeights

WAITING = 2
"""Blocks that are computed before the first of them is written."""


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

    from finetune_trainer.export.weights import MergedWeights  # noqa: PLC0415 - imports torch

    torch.set_num_threads(request["threads"])
    adapter = request["adapter"]
    weights = MergedWeights.open(Path(request["base"]), Path(adapter) if adapter else None)
    with torch.inference_mode():
        model = build(request, weights)
        model.prepare_tensors()
        model.prepare_metadata(vocab_only=False)
        if not request["beginsWithBos"]:
            dont_add_bos(model.gguf_writer)
        write_file(model.gguf_writer, Path(request["target"]))


def build(request: dict[str, Any], weights: MergedWeights) -> Any:
    """The converter for the model's architecture, with tensors of the merged weights."""
    import gguf  # noqa: PLC0415 - not before the path is set
    from conversion import (  # type: ignore[import-not-found] # noqa: PLC0415
        ModelBase,
        ModelType,
        get_model_architecture,
        get_model_class,
    )

    from finetune_trainer.export.gguf.blocks import stored_tensor  # noqa: PLC0415

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


def write_file(writer: Any, target: Path) -> None:
    """Write head and tensors; the next blocks are computed while one is written."""
    writer.write_header_to_file(path=target)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    file.flush()
    done, total = 0, sum(tensor.nbytes for tensor in writer.tensors[0].values())
    with ThreadPoolExecutor(1, "writer") as thread:
        waiting: deque[tuple[int, Future[int]]] = deque()
        for values in contents(writer):
            waiting.append((values.nbytes, thread.submit(file.write, values)))
            if len(waiting) > WAITING:
                size, written = waiting.popleft()
                written.result()
                done += size
                child.say_progress(min(done, total), total)
        for _, written in waiting:
            written.result()
    writer.close()
    child.say_progress(total, total)


def contents(writer: Any) -> Iterator[memoryview]:
    """The bytes of all tensors in the order of the file, with the padding between them."""
    from finetune_trainer.export.gguf.blocks import raw  # noqa: PLC0415 - imports the converter

    for name, info in writer.tensors[0].items():
        size = 0
        for block in blocks_of(info.tensor):
            refuse_infinite(name, block)
            values = raw(block)
            size += values.nbytes
            yield values
        if size != info.nbytes:
            sys.exit(f"tensor {name} has {size} bytes instead of {info.nbytes}")
        info.tensor = None
        padding = writer.ggml_pad(size, writer.data_alignment) - size
        if padding:
            yield memoryview(bytes(padding))


def blocks_of(tensor: Any) -> Iterator[torch.Tensor]:
    """The values as they are written; what the converter computes itself comes in one piece."""
    import gguf  # noqa: PLC0415 - not before the path is set
    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415

    from finetune_trainer.export.gguf.blocks import BlockArray  # noqa: PLC0415

    if isinstance(tensor, BlockArray):
        yield from tensor.blocks()
    else:
        values = gguf.LazyNumpyTensor.to_eager(tensor)
        yield torch.from_numpy(np.ascontiguousarray(values))


def refuse_infinite(name: str, block: torch.Tensor) -> None:
    """float16 ends at 65,504, and what is beyond would be infinite."""
    import torch  # noqa: PLC0415

    if block.dtype is torch.float16 and not torch.isfinite(block).all():
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            f"The model's {name} has values that F16 can't hold (its largest is 65,504): write "
            "BF16 instead of F16 in spec.export.gguf.",
        )


if __name__ == "__main__":
    main()
