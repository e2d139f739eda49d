"""Several processes that train together: starting them, which one this is, and sharing the model.

    python -m finetune_trainer.train.recipe.processes [torchrun's arguments] <pid of the stage>

is torchrun, whose exit status is here that of the worker that ended first. The worker asks before
it loads torch, so the functions that need torch import it themselves.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from finetune_trainer.contract import TrainingPlan
from finetune_trainer.runtime import child
from finetune_trainer.runtime.lifecycle import set_up_libraries

if TYPE_CHECKING:
    import torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

TIMEOUT = timedelta(minutes=30)  # the longest that one process may wait for another, e.g. to load
CLOSE_SECONDS = 29  # torchrun waits 30 s between SIGTERM and SIGKILL; its times are whole seconds

FSDP_CONFIG: dict[str, str | int | bool] = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "reshard_after_forward": True,
    "cpu_ram_efficient_loading": True,
    "state_dict_type": "FULL_STATE_DICT",
}

log = logging.getLogger(__name__)

# What gloo and NCCL say in the processes that are left.
_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "DistBackendError",
    "DistNetworkError",
)


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that reports and saves."""
    return os.environ.get("RANK", "0") == "0"


def is_lost_peer(error: BaseException) -> bool:
    """Whether the error only says that another process of the training is gone."""
    text = f"{type(error).__name__}: {error}"
    return world_size() > 1 and any(sign in text for sign in _LOST_PEER)


def record_failure(error: BaseException) -> None:
    """Leave the error, with its time, where torchrun looks for it."""
    if world_size() == 1:
        return
    from torch.distributed.elastic.multiprocessing.errors import (  # noqa: PLC0415 - see above
        get_error_handler,
    )

    get_error_handler().record_exception(error)


@contextmanager
def joined(plan: TrainingPlan) -> Iterator[None]:
    """Be one of torchrun's processes while the block runs, each with a GPU of its own."""
    if world_size() == 1:
        yield
        return
    import torch  # noqa: PLC0415 - see above
    import torch.distributed as dist  # noqa: PLC0415

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if plan.parallelism == "fsdp":
        # Transformers and PEFT read these: only the first process then loads the weights.
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    dist.init_process_group("nccl" if gpu else "gloo", timeout=TIMEOUT)
    try:
        yield
        dist.barrier()  # nobody leaves while the first one still writes
    finally:
        dist.destroy_process_group()


def loading_device(plan: TrainingPlan) -> str:
    """Where the model is loaded to. With fsdp not the GPU, which could not hold it whole."""
    import torch  # noqa: PLC0415 - see above

    if torch.cuda.is_available() and plan.parallelism != "fsdp":
        return f"cuda:{torch.cuda.current_device()}"
    return "cpu"


def reduce_in_float32(plugin: Any) -> None:
    """Let accelerate's FSDP add up gradients in float32; it would do so in the compute type."""
    policy = plugin.mixed_precision_policy
    if policy is not None:
        import torch  # noqa: PLC0415 - see above

        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32)


def gathered_state(model: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """The trained weights by the model's own names, whole, on the CPU. Each process must call it.

    None where each process has them whole in its model. Empty in all but the first process.
    """
    from torch.distributed.checkpoint.state_dict import (  # noqa: PLC0415 - see above
        StateDictOptions,
        get_model_state_dict,
    )
    from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415

    if not isinstance(model, FSDPModule):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return cast("dict[str, torch.Tensor]", get_model_state_dict(model, options=options))


def main(arguments: list[str], parent: int) -> int:
    """Run with torchrun's own arguments. A worker killed by a signal gives 128 + its number."""
    child.die_with_parent(parent)
    set_up_libraries()
    from torch.distributed.elastic.multiprocessing import SignalException  # noqa: PLC0415
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: PLC0415
    from torch.distributed.run import parse_args, run  # noqa: PLC0415

    # It would add a page to what is logged below.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args([*arguments, str(os.getpid())]))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        return _report(error)
    except SignalException as stop:
        return 128 + int(stop.sigval)
    return 0


def _report(error: ChildFailedError) -> int:
    """Log the failures, the first one first. The status of the one that took the others with it.

    One that the kernel killed left no error, and those that lose it may leave theirs before
    torchrun looks. Whoever is left when torchrun looks is ended by its signals, which count last.
    """
    failures = sorted(error.failures.items(), key=lambda each: _order(each[1]))
    for rank, failure in failures:
        log.warning(
            "Process %d ended with status %d: %s", rank, failure.exitcode, _first_line(failure)
        )
    began = min(failure.timestamp for _, failure in failures)
    for _, failure in failures:
        by_torchrun = failure.timestamp - began >= CLOSE_SECONDS
        if failure.exitcode == -signal.SIGKILL and not by_torchrun:
            return 128 + signal.SIGKILL
    status = int(failures[0][1].exitcode)
    return status if status >= 0 else 128 - status


def _order(failure: ProcessFailure) -> tuple[bool, int]:
    """Whether a signal ended it, and nanoseconds.

    What it notes itself is in whole seconds, and all may fail within one.
    """
    file = Path(failure.error_file)
    at = file.stat().st_mtime_ns if file.exists() else failure.timestamp * 1_000_000_000
    return failure.exitcode < 0, at


def _first_line(failure: ProcessFailure) -> str:
    if not Path(failure.error_file).exists() and failure.exitcode >= 0:
        return "it left no error"
    return f"{_words(failure).strip().splitlines()[0]:.500}"


def _words(failure: ProcessFailure) -> str:
    """Its message, which is wrapped where it comes from a file."""
    found: Any = failure.message
    return str(found["message"]) if isinstance(found, dict) else str(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:-1], int(sys.argv[-1])))
