"""llama.cpp's converter at work on the merged weights, in a process of its own.

It reads a ConvertRequest from standard input.

The converter reads configuration and tokenizer from `folder` and asks for its tensors by name; they
come from base and adapter, with the adapter's delta added as each is written.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.export.gguf import ConvertRequest
from finetune_trainer.model import converter
from finetune_trainer.runtime import child

if TYPE_CHECKING:
    import torch

    from finetune_trainer.export.merge import MergedWeights

WAITING = 2
"""Blocks that may be ready before the one that is written."""


def main() -> None:
    """Do what standard input asks for."""
    request = ConvertRequest.model_validate_json(sys.stdin.read())
    logging.basicConfig(level=logging.WARNING)
    # Its own gguf-py goes before the package of that name, which may be of another version.
    sys.path[:0] = [str(request.llama), str(request.llama / "gguf-py")]
    try:
        write(request)
    except StageError as error:
        converter.end_with(error)


def write(request: ConvertRequest) -> None:
    """Write the file that is asked for."""
    import torch  # noqa: PLC0415 - not before the path is set

    from finetune_trainer.export.merge import MergedWeights  # noqa: PLC0415 - imports torch

    torch.set_num_threads(request.threads)
    weights = MergedWeights.open(request.base, request.adapter)
    model = build(request, weights)
    model.prepare_tensors()
    model.prepare_metadata(vocab_only=False)
    if not request.begins_with_bos:
        dont_add_bos(model.gguf_writer)
    write_file(model.gguf_writer, request.target, request.threads)


def build(request: ConvertRequest, weights: MergedWeights) -> Any:
    """The converter for the model's architecture, with tensors of the merged weights."""
    import gguf  # noqa: PLC0415 - not before the path is set
    from conversion import (  # type: ignore[import-not-found] # noqa: PLC0415
        ModelBase,
        ModelType,
        get_model_architecture,
        get_model_class,
    )

    from finetune_trainer.export.gguf.blocks import stored_tensor  # noqa: PLC0415

    folder = request.folder
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

    mostly = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}[request.kind]
    kind = gguf.LlamaFileType[mostly]
    return MergedModel(folder, kind, request.target, model_name=request.name)


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
    waiting: deque[Future[bytes | memoryview]] = deque()

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


def blocks(writer: Any) -> Iterator[Callable[[], bytes | memoryview]]:
    """What computes the bytes of all tensors, in the order of the file."""
    from finetune_trainer.export.gguf.blocks import BlockArray, whole  # noqa: PLC0415

    for name, info in writer.tensors[0].items():
        tensor, info.tensor = info.tensor, None  # to be forgotten when it is written
        parts = tensor.blocks() if isinstance(tensor, BlockArray) else (partial(whole, tensor),)
        for part in parts:
            yield partial(exact_bytes, name, part)
        if rest := padded(writer, info) - info.nbytes:
            yield partial(bytes, rest)  # zeros


def padded(writer: Any, info: Any) -> int:
    """Bytes that a tensor takes in the file."""
    return int(writer.ggml_pad(info.nbytes, writer.data_alignment))


def exact_bytes(name: str, block: Callable[[], torch.Tensor]) -> memoryview:
    """The bytes of a block; refuses what F16 can't hold, which would be infinite."""
    import torch  # noqa: PLC0415 - not before the path is set

    from finetune_trainer.export.merge import is_finite  # noqa: PLC0415 - imports torch
    from finetune_trainer.export.merge.checkpoint import raw  # noqa: PLC0415

    values = block()
    if values.dtype is torch.float16 and not is_finite(values):
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            f"The model's {name} has values that F16 can't hold (its largest is 65,504): write "
            "BF16 instead of F16 in spec.export.gguf.",
        )
    return raw(values)


if __name__ == "__main__":
    main()
