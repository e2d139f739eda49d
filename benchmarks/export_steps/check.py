"""What checking one GGUF file reads of it: the bytes that came from the disk.

    python -m benchmarks.export_steps.check FOLDER FILE     -> {"size": …, "read": …, "passes": …}

The file is put out of the kernel's cache first. `read` is this process's read_bytes, which pages of
mapped files are in (proc_pid_io(5); rchar isn't about them). Where the file stays in memory it is
read once; where there is less, once for each pass over the weights, so that `passes` is what a pod
without room for the model reads.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

from transformers import AutoTokenizer

from finetune_trainer.export.gate.rows import choose_rows
from finetune_trainer.export.llama import CheckRequest
from finetune_trainer.export.llama.llama_worker import UBATCH, LlamaSession, check, decodes_of


def measure(folder: str, name: str) -> None:
    """Check the file on the rows that the gate would choose."""
    place, file = Path(folder), Path(name)
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    lines = (place / "rows.jsonl").read_text().splitlines()
    rows = choose_rows(tokenizer, [json.loads(line) for line in lines])
    request = CheckRequest(
        file=file,
        texts=rows.texts,
        ends=(),
        rows=rows.measured,
        reference=None,
        logprobs_file=None,
        threads=max(1, len(os.sched_getaffinity(0)) // 2),
    )
    vocabulary = LlamaSession(file, threads=1, vocabulary_only=True).size
    decodes = [sum(len(row.ids) for row in each) for each in decodes_of(rows.measured, vocabulary)]
    forget(file)
    before = read_bytes()
    check(request)
    found = {
        "size": file.stat().st_size,
        "read": read_bytes() - before,
        "tokens": sum(decodes),
        "answers": rows.tokens,
        "passes": 1 + sum(math.ceil(tokens / UBATCH) for tokens in decodes),  # 1: looking at all
    }
    json.dump(found, sys.stdout)


def forget(file: Path) -> None:
    """Let the kernel drop the file's pages."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bytes() -> int:
    """What this process had the disk read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


if __name__ == "__main__":
    measure(*sys.argv[1:])
