"""The importance matrix: how large each layer's inputs are on rows of the training.

Quantizations of few bits then round those weights most carefully that are multiplied by most. It is
measured on base model and adapter as transformers and PEFT run them, and written as llama.cpp's own
tool writes it (see importance_file).
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import Example, Reason, StageError
from finetune_trainer.export.gguf.convert import Model
from finetune_trainer.model.tokenizer import encode_batch, load_tokenizer
from finetune_trainer.runtime import child
from finetune_trainer.runtime.progress import Reporter

CHUNK_TOKENS = 512
"""Tokens of one pass, as in llama.cpp's imatrix tool."""

MAX_CHUNKS = 32
"""16,384 tokens; an 8B model reads them in some minutes on a few CPUs. Sums of squares settle
early: more text changes the quantized files little."""

BATCH = 64  # rows that are tokenized together

WORKER = "finetune_trainer.export.gguf.importance_worker"


def write_importance(
    model: Model,
    file: Path,
    examples: Sequence[Example],
    target: Path,
    reporter: Reporter,
) -> None:
    """Measure on the examples and write the file `target`.

    `file` is a GGUF file of the model without quantization, whose names are used. Raises
    StageError when the model can't be run, or has no layer by one of these names.
    """
    tokenizer = load_tokenizer(model.folder, trust_remote_code=model.trust_remote_code)
    request = {
        "base": str(model.base),
        "adapter": model.adapter and str(model.adapter),
        "trust": model.trust_remote_code,
        "file": str(file),
        "chunks": list(chunks(tokenizer, examples)),
        "chunkTokens": CHUNK_TOKENS,
        "target": str(target),
    }
    reporter.message("Measuring which weights matter most")
    done = child.run(
        [sys.executable, "-m", WORKER], json.dumps(request), on_progress=reporter.steps
    )
    if done.status != 0:
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            f"The importance matrix could not be measured: {done.last_line():.300}. Set "
            "spec.export.importanceMatrix to false.",
        )


def chunks(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> Iterable[list[int]]:
    """Conversations end to end, in pieces of CHUNK_TOKENS; the last may be shorter.

    In an order of their own, always the same: files are often sorted, and MAX_CHUNKS cuts them.
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
