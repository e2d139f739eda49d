"""One of several processes that train together: joining them, and what only the first one does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from finetune_trainer.contract import TrainingPlan
from finetune_trainer.train.link.processes import world_size

TIMEOUT = timedelta(minutes=30)  # the longest that one process may wait for another, e.g. to load


@contextmanager
def joined(plan: TrainingPlan) -> Iterator[None]:
    """Be one of torchrun's processes while the block runs, each with a GPU of its own."""
    if world_size() == 1:
        yield
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if plan.parallelism == "fsdp":
        # Read by transformers and PEFT: only the first process then loads the weights.
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    dist.init_process_group("nccl" if gpu else "gloo", timeout=TIMEOUT)
    try:
        yield
        dist.barrier()  # nobody leaves while the first one still writes
    finally:
        dist.destroy_process_group()


def options(plan: TrainingPlan) -> dict[str, Any]:
    """Arguments of the Trainer for the plan's way of sharing the work, by its names."""
    shared: dict[str, Any] = {
        "ddp_find_unused_parameters": False,
        "average_tokens_across_devices": True,  # one mean over the labels of all processes
    }
    if plan.parallelism != "fsdp":
        return {**shared, "gradient_checkpointing": plan.gradient_checkpointing}
    return {
        **shared,
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "reshard_after_forward": True,
            "cpu_ram_efficient_loading": True,
            "state_dict_type": "FULL_STATE_DICT",
            # The Trainer's own would gather each layer's weights once more.
            "activation_checkpointing": plan.gradient_checkpointing,
        },
        "gradient_checkpointing": False,
    }


def loading_device(plan: TrainingPlan) -> str:
    """Where the model is loaded to: with fsdp not to the GPU, which could not hold all of it."""
    if torch.cuda.is_available() and plan.parallelism != "fsdp":
        return f"cuda:{torch.cuda.current_device()}"
    return "cpu"


def gathered_state(model: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """The trained weights by the model's own names, whole, on the CPU; call it in each process.

    None where each process has them whole in its model; empty in all but the first process.
    """
    if not isinstance(model, FSDPModule):
        return None
    wanted = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return cast("dict[str, torch.Tensor]", get_model_state_dict(model, options=wanted))
