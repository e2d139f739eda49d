"""Checkpoints of a model that is spread over several processes (fsdp).

They hold the whole adapter and the whole optimizer state, by the parameters' names, as a single
process would write them; each process takes its part when it goes on. The Trainer's own way of
loading (accelerate's) makes the processes wait for each other for ever with an adapter.

Every function is called in each process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

ADAPTER = "adapter_model.safetensors"
OPTIMIZER = "optimizer.pt"


def save_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path, *, write: bool
) -> None:
    """Gather the moments of all processes; the one with `write` writes them."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, folder / OPTIMIZER)


def load_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Take this process's part of the moments."""
    state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    set_optimizer_state_dict(model, optimizer, state, options=options)


def load_adapter(model: torch.nn.Module, folder: Path) -> None:
    """Take this process's part of the adapter; RuntimeError when it is one of another shape."""
    saved = load_file(folder / ADAPTER)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    # PEFT's files leave out the adapter's own name.
    names = {name: name.replace(".default.", ".") for name in trained}
    if set(names.values()) != saved.keys():
        raise RuntimeError(f"{ADAPTER} in {folder} is not of this model's layers")
    state: dict[str, Any] = {name: saved[short] for name, short in names.items()}
    options = StateDictOptions(full_state_dict=True, strict=False, ignore_frozen_params=True)
    set_model_state_dict(model, state, options=options)
