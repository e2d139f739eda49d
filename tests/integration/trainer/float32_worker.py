"""The worker in float32, on whatever processor; it notes what of the model this process holds.

Variables tell it more; each name begins with FINETUNE_WORKER_, since a worker gets no others.

COMPUTE_DTYPE=bfloat16 computes in that instead.

FAIL=RANK:STEP:HOW lets one of the processes run out of GPU memory (full), meet an error of NCCL
(nccl, nccl-full) or be killed after a step, or run out of memory within it as long as a pass has
several rows (crowded).

FUSED=yes computes adapters as one operation, as on a GPU; it notes how many products it took.

HOLD=yes lets every process wait after the second step until it is told to stop.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from finetune_trainer.model import loading
from finetune_trainer.train.recipe import processes, train_worker, training_log

NOTE = "held-{}.json"
FUSED_NOTE = "fused-{}.json"
HOLD_SECONDS = 120
# As PyTorch words what NCCL says.
NCCL = {
    "nccl": "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.29.7\nncclSystemError: System call failed.",
    "nccl-full": "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error, NCCL version "
    "2.29.7\nLast error:\nCuda failure 2 'out of memory'",
}


class Failing(TrainerCallback):
    """Fails once, in one process."""

    def on_step_end(
        self,
        args: Any,  # noqa: ARG002 - transformers' name
        state: Any,
        control: Any,  # noqa: ARG002 - transformers' name
        **_: Any,
    ) -> None:
        rank, step, how = os.environ["FINETUNE_WORKER_FAIL"].split(":")
        if os.environ.get("RANK", "0") != rank or state.global_step != int(step):
            return
        if how == "crowded":
            return
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how in NCCL:
            raise torch.distributed.DistBackendError(NCCL[how])
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Holding(TrainerCallback):
    """Begins no third step before SIGTERM has come."""

    def __init__(self) -> None:
        self._told = threading.Event()

    def on_step_begin(
        self,
        args: Any,  # noqa: ARG002 - transformers' name
        state: Any,
        control: Any,  # noqa: ARG002 - transformers' name
        **_: Any,
    ) -> None:
        if state.global_step == 1:  # the worker's own handler is there by now
            handle = signal.getsignal(signal.SIGTERM)
            assert callable(handle)

            def tell(number: int, frame: FrameType | None) -> None:
                self._told.set()
                handle(number, frame)

            signal.signal(signal.SIGTERM, tell)
        if state.global_step == 2:
            assert self._told.wait(HOLD_SECONDS)


def _fail_while_crowded(trainer: Any) -> None:
    rank, failing, how = os.environ["FINETUNE_WORKER_FAIL"].split(":")
    if how != "crowded" or os.environ.get("RANK", "0") != rank:
        return

    def before(model: torch.nn.Module, _: Any) -> None:
        crowded = trainer.limits.rows > 1
        if model.training and crowded and trainer.state.global_step + 1 == int(failing):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    trainer.model.register_forward_pre_hook(before)


def _let_accelerate_shard_on_a_cpu() -> None:
    """PyTorch's fully_shard runs on CPUs as well; accelerate would quietly do without it."""
    made = AcceleratorState.__init__

    def make(self: AcceleratorState, *args: Any, **options: Any) -> None:
        state = PartialState()
        if (
            options.get("fsdp_plugin") is None
            or state.distributed_type != DistributedType.MULTI_CPU
        ):
            made(self, *args, **options)
            return
        state.distributed_type = DistributedType.MULTI_XPU
        made(self, *args, **options)
        state.distributed_type = DistributedType.MULTI_CPU

    AcceleratorState.__init__ = make


def _fuse_on_a_cpu(workdir: list[Path]) -> None:
    """Which the recipe does on a GPU only."""
    from finetune_trainer.train.recipe import lora, sft

    faster = lora.make_layers_faster
    apply: Any = lora.LowRankProduct.apply
    taken = [0]

    def counted(*arguments: Any) -> Any:
        taken[0] += 1
        if workdir:
            note = workdir[0] / FUSED_NOTE.format(os.environ.get("RANK", "0"))
            note.write_text(json.dumps(taken[0]))
        return apply(*arguments)

    def make(model: torch.nn.Module) -> None:
        faster(model)
        assert lora.fuse_adapters(model, "cpu")

    vars(sft)["make_layers_faster"] = make
    lora.LowRankProduct.apply = counted  # type: ignore[method-assign]


def main(address: Path, parent: int) -> int:
    """Train; bfloat16 would hide the differences that the tests look for."""
    dtype: torch.dtype = getattr(torch, os.environ.get("FINETUNE_WORKER_COMPUTE_DTYPE", "float32"))
    loading.compute_dtype = lambda: dtype
    workdir: list[Path] = []
    gathered, guard = processes.gathered_state, training_log.guard_trackers

    if os.environ.get("FINETUNE_WORKER_FUSED"):
        _fuse_on_a_cpu(workdir)

    def noting(model: torch.nn.Module) -> Any:
        # Of the layers only: embeddings stay gathered between two passes.
        layers = [p for name, p in model.named_parameters() if ".layers." in name]
        parts = [p.to_local() if isinstance(p, DTensor) else p for p in layers]
        held = {"held": sum(p.numel() for p in parts), "all": sum(p.numel() for p in layers)}
        (workdir[0] / NOTE.format(os.environ.get("RANK", "0"))).write_text(json.dumps(held))
        return gathered(model)

    def guarding(trainer: Any) -> None:
        guard(trainer)
        workdir.append(Path(trainer.args.output_dir).parent)
        if "FINETUNE_WORKER_FAIL" in os.environ:
            trainer.add_callback(Failing())
            _fail_while_crowded(trainer)
        if "FINETUNE_WORKER_HOLD" in os.environ:
            trainer.add_callback(Holding())

    processes.gathered_state, training_log.guard_trackers = noting, guarding
    _let_accelerate_shard_on_a_cpu()
    return train_worker.main(address, parent)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
