"""The importance matrix: how large each layer's inputs are on rows of the training.

A quantization to few bits then rounds the weights most carefully that large inputs meet. It is
measured on base model and adapter as transformers and PEFT run them, and written as llama.cpp's own
tool writes it (see quantize_worker). The model runs in a process of its own, `python -m` this
module, which reads an ImportanceRequest.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import Example, Reason, StageError
from finetune_trainer.export.gguf import INPUT_COUNTS, INPUT_SUMS, ImportanceRequest
from finetune_trainer.export.gguf.files import GgufSource
from finetune_trainer.export.gguf.header import Header
from finetune_trainer.export.reference.float32 import load_streamed
from finetune_trainer.model.loading import use_available_cpus
from finetune_trainer.model.tokenizer import encode_batch, load_tokenizer
from finetune_trainer.runtime import child
from finetune_trainer.runtime.reporter import Reporter

CHUNK_TOKENS = 512
"""Tokens of one pass, as in llama.cpp's imatrix tool."""

MAX_CHUNKS = 32
"""16,384 tokens; an 8B model reads them in some minutes on a few CPUs. Sums of squares settle
early: more text changes the quantized files little."""

BATCH = 64  # rows that are tokenized together
HEAD_TOKENS = 64  # of a chunk, for the output layer, whose logits are large
_PEFT = ("base_model.model.", ".base_layer")


def write_importance(
    model: GgufSource,
    file: Path,
    examples: Sequence[Example],
    target: Path,
    reporter: Reporter,
) -> None:
    """Measure on the examples and write the file `target`.

    `file` is a GGUF file of the model without quantization, whose names are used. Raises
    StageError when the model can't be run, or has no layer by one of these names.
    """
    tokenizer = load_tokenizer(model.folder)
    request = ImportanceRequest(
        base=model.base,
        adapter=model.adapter,
        file=file,
        chunks=tuple(tuple(chunk) for chunk in chunks(tokenizer, examples)),
        chunk_tokens=CHUNK_TOKENS,
        target=target,
    )
    reporter.message("Measuring which weights matter most")
    done = child.run(
        [sys.executable, "-m", __name__],
        request.model_dump_json(),
        on_progress=child.as_steps(reporter),
    )
    if done.status != 0:
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            f"The importance matrix could not be measured: {done.last_line():.300}. Set "
            "spec.export.importanceMatrix to false.",
        )


def chunks(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> Iterable[list[int]]:
    """Conversations end to end, in pieces of CHUNK_TOKENS; the last may be shorter.

    They are shuffled, always in the same way: files are often sorted, and MAX_CHUNKS cuts them.
    """
    shuffled = random.Random(0).sample(examples, len(examples))  # noqa: S311 - no secret
    groups = (shuffled[start : start + BATCH] for start in range(0, len(shuffled), BATCH))
    tokens = chain.from_iterable(
        item.ids for group in groups for item in encode_batch(tokenizer, group)
    )
    for _ in range(MAX_CHUNKS):
        piece = list(islice(tokens, CHUNK_TOKENS))
        if not piece:
            return
        yield piece


class InputSums:
    """Sums of the squared inputs of one linear layer."""

    def __init__(self, width: int) -> None:
        self.sums: npt.NDArray[np.float64] = np.zeros(width)
        self.count = 0

    def __call__(self, _: Any, args: tuple[torch.Tensor, ...]) -> None:
        # A hook before the layer's forward pass.
        rows = args[0].reshape(-1, args[0].shape[-1])
        self.sums += rows.square().sum(dim=0, dtype=torch.float64).numpy()
        self.count += rows.shape[0]


def gguf_names(file: Path) -> dict[str, str]:
    """From transformers' names of linear layers' weights to those of a GGUF file's tensors."""
    with Header(file) as header:
        architecture = header.value("general.architecture")
        blocks = header.value(f"{architecture}.block_count")
        tensors = set(header.tensors)
    by_name = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(by_name[architecture], blocks)
    found = {}
    for key in names.mapping:
        name = names.get_name(f"{key}.weight", try_suffixes=(".weight",))
        if name and name in tensors:
            found[f"{key}.weight"] = name
    if "output.weight" not in tensors:  # the embedding is the output layer as well
        found["lm_head.weight"] = "token_embd.weight"
    return found


def plain_name(module: str) -> str:
    """A module's name without PEFT's additions."""
    for part in _PEFT:
        module = module.replace(part, "")
    return module


def hook_linear_layers(model: torch.nn.Module, names: dict[str, str]) -> dict[str, InputSums]:
    """Hook every linear layer that the GGUF file has, by its name there."""
    sums: dict[str, InputSums] = {}
    for path, module in model.named_modules():
        name = names.get(f"{plain_name(path)}.weight")
        if name and isinstance(module, torch.nn.Linear):
            sums[name] = InputSums(module.in_features)
            module.register_forward_pre_hook(sums[name])
    return sums


@torch.no_grad()
def run_over(model: Any, chunks: Sequence[Sequence[int]]) -> None:
    total, done = sum(len(chunk) for chunk in chunks), 0
    for chunk in chunks:
        ids = torch.tensor([list(chunk)])
        model(input_ids=ids, use_cache=False, logits_to_keep=min(HEAD_TOKENS, len(chunk)))
        done += len(chunk)
        child.say_progress(done, total)


def write_matrix(target: Path, sums: dict[str, InputSums], chunks: int, chunk_tokens: int) -> None:
    """Write the file as llama.cpp's imatrix tool does."""
    writer = gguf.GGUFWriter(target, "")
    writer.kv_data[0].pop(gguf.Keys.General.ARCHITECTURE, None)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["rows of the training"])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", chunk_tokens)
    for name, inputs in sorted(sums.items()):
        writer.add_tensor(name + INPUT_SUMS, inputs.sums.astype(np.float32).reshape(1, -1))
        writer.add_tensor(name + INPUT_COUNTS, np.array([[inputs.count]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    request = ImportanceRequest.model_validate_json(sys.stdin.read())
    use_available_cpus()
    model = load_streamed(request.base, request.adapter)
    sums = hook_linear_layers(model, gguf_names(request.file))
    if not sums:
        sys.exit("none of its layers has a name that the GGUF file knows")
    run_over(model, request.chunks)
    sums = {name: inputs for name, inputs in sums.items() if inputs.count}
    write_matrix(request.target, sums, len(request.chunks), request.chunk_tokens)


if __name__ == "__main__":
    main()
