"""A GGUF file as another type, through llama.cpp's library."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sys
from pathlib import Path

from finetune_trainer.contract import Quantization, Reason, StageError
from finetune_trainer.model.loading import available_cpus
from finetune_trainer.runtime import child
from finetune_trainer.runtime.child import shown_by
from finetune_trainer.runtime.progress import Reporter
from finetune_trainer.store.local import replacing

WORKER = "finetune_trainer.export.gguf.quantize_worker"
BUFFER_BYTES = 64 << 20
"""For the rows that llama.cpp has in work at a time: as they are read (from a mapped file), in
float32 and quantized. A row of a matrix is always done as a whole."""

log = logging.getLogger(__name__)


def quantize(
    source: Path,
    target: Path,
    kind: Quantization,
    importance: Path | None = None,
    *,
    reporter: Reporter | None = None,
) -> None:
    """Write `source`, an unquantized GGUF file, as another type to the file `target`.

    `importance` is an importance matrix of llama.cpp as a GGUF file. Raises
    StageError(ModelUnsupported) where llama.cpp can't do it.
    """
    with replacing(target) as partial:
        request = {
            "source": str(source),
            "target": str(partial),
            "type": kind.value,
            "threads": available_cpus(),
            "bufferBytes": BUFFER_BYTES,
            "importance": importance and str(importance),
        }
        command = [sys.executable, "-m", WORKER]
        listener = shown_by(reporter, f"Writing {target.name}")
        done = child.run(command, json.dumps(request), on_progress=listener)
        if done.status != 0:
            log.error("llama.cpp's quantizer failed:\n%s", done.errors[-4000:])
            raise _failure(done, source, target, kind)


def _failure(done: child.Finished, source: Path, target: Path, kind: Quantization) -> Exception:
    # llama.cpp does not say why it could not write.
    if shutil.disk_usage(target.parent).free < source.stat().st_size // 100:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return StageError(
        Reason.MODEL_UNSUPPORTED,
        f"llama.cpp can't quantize this model to {kind}: {done.last_line().rstrip('.'):.300}. "
        "Leave it out of spec.export.gguf.",
    )
