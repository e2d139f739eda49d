"""Nothing in a training step waits for the GPU to know a number.

A CPU has nothing to wait for; but each time that a tensor's value becomes a Python number, torch
calls an operator of its own for it, which is counted here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from finetune_trainer.model.tokenizer import message_pair
from tests.integration.trainer.recipe import build


class CountReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts tensors that become numbers: item(), bool(), float(), tolist()."""

    reads: int = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads(model: Path, workdir: Path, steps: int, **settings: Any) -> int:
    """How often a training of `steps` steps reads a number."""
    rows = [message_pair(f"Say {n}.", "word " * (3 + n % 4)) for n in range(2 * steps)]
    trainer = build(model, workdir, rows, batchSize=1, gradientAccumulationSteps=2, **settings)
    # As on a GPU: AdamW step by step reads its own count, which it keeps on the CPU.
    trainer.args.optim = "adamw_torch_fused"
    counter = CountReads()  # type: ignore[no-untyped-call]
    with counter:
        trainer.train()
    assert trainer.state.global_step == steps
    return counter.reads


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers looks whether rows are packed, once for each pass: that isn't ours to change."""
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: None)


@pytest.mark.usefixtures("masks")
def test_only_a_step_that_is_logged_reads_numbers(tiny_model: Path, tmp_path: Path) -> None:
    """Loss, gradient norm and finiteness stay tensors; logging each step would be seen."""
    few, more, logged = (
        reads(tiny_model, tmp_path, steps, loggingSteps=every)
        for steps, every in ((3, 100), (7, 100), (7, 1))
    )
    assert few == more
    assert logged >= more + 6
