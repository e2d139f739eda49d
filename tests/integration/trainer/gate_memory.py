"""What the gate takes of memory of its own, measured in a process of its own.

    python -m tests.integration.trainer.gate_memory llama <file> <folder>
    python -m tests.integration.trainer.gate_memory reference <base> <adapter> <folder>
        -> {"took": …}      bytes: the peak of its memory, less what it had with all imported

The kernel keeps the peak (VmHWM), which it begins anew when asked to (proc_pid_clear_refs(5)); so
no moment is missed. The model's file is in it, as far as it is read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from finetune_trainer.export.reference import MeasuredRow

ROWS = tuple(
    MeasuredRow(tuple(range(5 + n, 5 + n + 512)), tuple(range(384, 512))) for n in range(4)
)
"""2,048 tokens, 512 of them measured: as much as the gate takes of usual rows."""


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def llama(file: str, folder: str) -> None:
    """Check a file on the rows."""
    import numpy as np

    from finetune_trainer.export.llama import CheckRequest
    from finetune_trainer.export.llama.llama_worker import LlamaSession, check
    from finetune_trainer.export.reference import create_logprobs

    vocabulary = LlamaSession(Path(file), threads=1, vocabulary_only=True).size
    reference = Path(folder, "reference.npy")
    create_logprobs(reference, 512, vocabulary)[:] = np.float16(-10)
    request = CheckRequest(
        file=Path(file),
        texts=(),
        ends=(),
        rows=ROWS,
        reference=reference,
        logprobs_file=Path(folder, "kept.npy"),
        threads=1,
    )
    took(lambda: check(request))


def reference(base: str, adapter: str, folder: str) -> None:
    """Ask base model and adapter, and the base model as if it were the merged one."""
    import torch

    from finetune_trainer.export.reference import ReferenceRequest
    from finetune_trainer.export.reference.float32 import measure_here
    from finetune_trainer.model import ModelFolder

    torch.set_num_threads(1)
    request = ReferenceRequest(
        base=ModelFolder(Path(base)),
        adapter=Path(adapter),
        rows=ROWS,
        tuned_file=Path(folder, "tuned.npy"),
        base_file=Path(folder, "base.npy"),
        merged=ModelFolder(Path(base)),
    )
    took(lambda: measure_here(request))


def took(work: Callable[[], object]) -> None:
    """Do it, and say what it took at most."""
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work()
    json.dump({"took": status("VmHWM") - before}, sys.stdout)


if __name__ == "__main__":
    (llama if sys.argv[1] == "llama" else reference)(*sys.argv[2:])
