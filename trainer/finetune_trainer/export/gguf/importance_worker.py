"""The model at work for an importance matrix, in a process of its own.

A JSON request on standard input:

    {"base": …, "adapter": … or null, "trust": …, "file": …, "chunks": [[tokens]…],
     "chunkTokens": the most that one has, "target": …}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

from finetune_trainer.export.gguf.header import Header
from finetune_trainer.export.gguf.importance_file import COUNTS, SUMS
from finetune_trainer.export.reference.float32_model import load_streamed
from finetune_trainer.model.loading import use_available_cpus
from finetune_trainer.runtime import child

HEAD_TOKENS = 64  # of a chunk, for the output layer, whose logits are large
_PEFT = ("base_model.model.", ".base_layer")


class Inputs:
    """Sums of the squared inputs of one linear layer."""

    def __init__(self, width: int) -> None:
        self.sums: npt.NDArray[np.float64] = np.zeros(width)
        self.count = 0

    def __call__(self, _: Any, args: tuple[torch.Tensor, ...]) -> None:
        """Hook before the layer's forward pass."""
        rows = args[0].reshape(-1, args[0].shape[-1])
        self.sums += rows.square().sum(dim=0, dtype=torch.float64).numpy()
        self.count += rows.shape[0]


def gguf_names(file: Path) -> dict[str, str]:
    """Weights of linear layers by transformers' names to those of a GGUF file's tensors."""
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
    """A module's name without what PEFT wraps around it."""
    for part in _PEFT:
        module = module.replace(part, "")
    return module


def listen(model: torch.nn.Module, names: dict[str, str]) -> dict[str, Inputs]:
    """Hook every linear layer that the GGUF file has, by its name there."""
    heard: dict[str, Inputs] = {}
    for path, module in model.named_modules():
        name = names.get(f"{plain_name(path)}.weight")
        if name and isinstance(module, torch.nn.Linear):
            heard[name] = Inputs(module.in_features)
            module.register_forward_pre_hook(heard[name])
    return heard


@torch.no_grad()
def read(model: Any, chunks: list[list[int]]) -> None:
    """Run the model over all chunks."""
    total, done = sum(len(chunk) for chunk in chunks), 0
    for chunk in chunks:
        ids = torch.tensor([chunk])
        model(input_ids=ids, use_cache=False, logits_to_keep=min(HEAD_TOKENS, len(chunk)))
        done += len(chunk)
        child.say_progress(done, total)


def write(target: Path, heard: dict[str, Inputs], chunks: int, chunk_tokens: int) -> None:
    """Write the file as llama.cpp's imatrix tool does."""
    writer = gguf.GGUFWriter(target, "")
    writer.kv_data[0].pop(gguf.Keys.General.ARCHITECTURE, None)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["rows of the training"])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", chunk_tokens)
    for name, inputs in sorted(heard.items()):
        writer.add_tensor(name + SUMS, inputs.sums.astype(np.float32).reshape(1, -1))
        writer.add_tensor(name + COUNTS, np.array([[inputs.count]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Do what standard input asks for."""
    request = json.load(sys.stdin)
    use_available_cpus()
    adapter = Path(request["adapter"]) if request["adapter"] else None
    model = load_streamed(Path(request["base"]), adapter, trust_remote_code=request["trust"])
    heard = listen(model, gguf_names(Path(request["file"])))
    if not heard:
        sys.exit("none of its layers has a name that the GGUF file knows")
    read(model, request["chunks"])
    heard = {name: inputs for name, inputs in heard.items() if inputs.count}
    write(Path(request["target"]), heard, len(request["chunks"]), request["chunkTokens"])


if __name__ == "__main__":
    main()
