"""llama.cpp's converter from safetensors to GGUF, as a program of its own.

It comes from the same source as the llama_cpp package that quantizes and loads its files; the
environment variable LLAMA_CPP_DIR names the folder with convert_hf_to_gguf.py (left out: the folder
llama.cpp in the virtual environment).
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from pathlib import Path
from typing import Literal

from finetune_trainer.base_model import child
from finetune_trainer.outcome import Reason, StageError

SCRIPT = "convert_hf_to_gguf.py"

log = logging.getLogger(__name__)


def convert(model: Path, target: Path, kind: Literal["f16", "bf16", "f32"]) -> None:
    """Convert a model folder to one GGUF file. StageError(ModelUnsupported) when it can't be."""
    _run([str(model), "--outfile", str(target), "--outtype", kind])


def check_vocabulary(model: Path, target: Path) -> None:
    """Convert configuration and tokenizer only, which takes seconds and needs no weights.

    A model that llama.cpp does not know fails here, before a GPU is asked for. A tokenizer that it
    does not know fails here as well.
    """
    _run([str(model), "--outfile", str(target), "--vocab-only"])


def _run(arguments: list[str]) -> None:
    done = child.run([sys.executable, str(_script()), *arguments])
    if done.status == 0:
        return
    log.error("%s failed:\n%s", SCRIPT, (done.output + done.errors)[-4000:])
    if "No space left on device" in done.errors:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    cause = done.last_line().removeprefix("ERROR:hf-to-gguf:").rstrip(" .")
    raise StageError(
        Reason.MODEL_UNSUPPORTED,
        f"llama.cpp can't convert this model to GGUF: {cause:.300}. Choose another base "
        "model, or leave spec.export.gguf empty to get the adapter and the merged model only.",
    )


def _script() -> Path:
    # `make build` links the folder into the virtual environment; the image sets the variable.
    folder = Path(os.environ.get("LLAMA_CPP_DIR") or Path(sys.prefix) / "llama.cpp")
    script = folder / SCRIPT
    if not script.is_file():
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{folder} is not the folder with llama.cpp's {SCRIPT}: use the project's trainer "
            "image or `make build`, or name it in LLAMA_CPP_DIR.",
        )
    return script
