"""Memory that runs out when it is told to: torch's own error, raised inside the real training.

As a worker:  python -m tests.integration.trainer.full_memory worker <socket> <pid>
As the CLI, whose workers are these:  python -m tests.integration.trainer.full_memory train …
"""

from __future__ import annotations

import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from finetune_trainer.contract import Base
from finetune_trainer.train.supervisor import training_session

VARIABLE = "FINETUNE_WORKER_FAULT"  # a Fault as JSON
MESSAGE = (
    "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 23.65 GiB of "
    "which 11.06 MiB is free. Including non-PyTorch memory, this process has 23.60 GiB in use."
)


class Fault(Base):
    """When memory runs out in training."""

    where: Literal["forward", "backward", "optimizer"] = "forward"
    killed: bool = False
    """As the kernel does it, and not as torch does."""

    step: int | None = None
    """Only in this optimizer step (from 1)."""

    at_pass: int = 1
    """In this pass of the step (from 1) or any later one."""

    times: int | None = None
    """So often at most, over all workers."""

    tokens: int = -1
    """In passes with more tokens."""

    with_checkpointing: bool = True
    """Also where activations are computed again."""


class FullMemory:
    """Breaks trainers, and remembers the rows of each step that was not broken off."""

    def __init__(self, fault: Fault | None) -> None:
        self.fault = fault
        self.rows: dict[int, list[tuple[int, ...]]] = {}
        self.steps: list[int] = []
        """Every step begun, also again."""

        self._count = Path()
        self._passes: dict[int, int] = defaultdict(int)

    def wrap(self, build: Callable[..., Any]) -> Callable[..., Any]:
        """`sft.build_trainer`, whose trainers run out of memory."""

        def build_trainer(*args: Any, **options: Any) -> Any:
            self._count = options["work"].workdir / "memory-ran-out"
            trainer = build(*args, **options)
            self.attach(trainer)
            return trainer

        return build_trainer

    def attach(self, trainer: Any) -> None:
        """Watch the passes of a trainer."""
        self._passes.clear()
        trainer.model.register_forward_pre_hook(partial(self._before, trainer), with_kwargs=True)
        trainer.model.register_forward_hook(partial(self._after, trainer), with_kwargs=True)
        create = trainer.create_optimizer

        def create_optimizer(*args: Any) -> Any:
            optimizer = create(*args)
            step = optimizer.step

            def failing(*args: Any, **options: Any) -> Any:
                done = step(*args, **options)
                if self._is_due("optimizer", trainer, sys.maxsize, sys.maxsize):
                    self._raise()  # when some weights are changed already
                return done

            optimizer.step = failing
            return optimizer

        trainer.create_optimizer = create_optimizer

    def _before(self, trainer: Any, model: Any, _: Any, inputs: dict[str, Any]) -> None:
        if not model.training:
            return
        step = trainer.state.global_step + 1
        self._passes[step] += 1
        if self._passes[step] == 1:
            self.rows[step] = []
            self.steps.append(step)
        self.rows[step] += rows_of(inputs)
        if self._is_due("forward", trainer, self._passes[step], inputs["input_ids"].numel()):
            self._raise()

    def _after(self, trainer: Any, model: Any, _: Any, inputs: dict[str, Any], output: Any) -> None:
        number = self._passes[trainer.state.global_step + 1]
        size = inputs["input_ids"].numel()
        if model.training and self._is_due("backward", trainer, number, size):
            output.logits.register_hook(lambda _: self._raise())

    def _is_due(self, where: str, trainer: Any, number: int, tokens: int) -> bool:
        fault = self.fault
        return (
            fault is not None
            and fault.where == where
            and fault.step in (None, trainer.state.global_step + 1)
            and number >= fault.at_pass
            and tokens > fault.tokens
            and (fault.with_checkpointing or not trainer.args.gradient_checkpointing)
            and (fault.times is None or self._raised() < fault.times)
        )

    def _raised(self) -> int:
        return len(self._count.read_bytes()) if self._count.exists() else 0

    def _raise(self) -> None:
        with self._count.open("ab") as stream:
            stream.write(b".")
        if self.fault and self.fault.killed:
            os.kill(os.getpid(), signal.SIGKILL)
        raise torch.OutOfMemoryError(MESSAGE)


def rows_of(inputs: dict[str, Any]) -> list[tuple[int, ...]]:
    """The examples of a pass, whether they lie end to end or below each other."""
    ids = inputs["input_ids"]
    if "position_ids" in inputs:
        starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
        ends = [*starts[1:], ids.shape[1]]
        return [tuple(ids[0, a:b].tolist()) for a, b in zip(starts, ends, strict=True)]
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    return [tuple(row[:n].tolist()) for row, n in zip(ids, lengths, strict=True)]


def main(address: Path, parent: int) -> int:
    """The real worker, on a machine whose memory is full."""
    from finetune_trainer.train.recipe import sft, train_worker

    full = FullMemory(Fault.model_validate_json(os.environ[VARIABLE]))
    sft.build_trainer = full.wrap(sft.build_trainer)
    return train_worker.main(address, parent)


class FullMemoryWorker(training_session.WorkerProcess):
    """Starts this worker in place of the real one."""

    def __init__(self) -> None:
        super().__init__("tests.integration.trainer.full_memory")

    def _command(self, *args: Any) -> list[str]:
        *start, address = super()._command(*args)
        return [*start, "worker", address]


def command() -> None:
    """The real command, whose train stage starts this worker."""
    from finetune_trainer import __main__

    setattr(training_session, "WorkerProcess", FullMemoryWorker)  # noqa: B010 - mypy refuses the assignment
    __main__.main()


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        sys.exit(main(Path(sys.argv[2]), int(sys.argv[3])))
    command()
