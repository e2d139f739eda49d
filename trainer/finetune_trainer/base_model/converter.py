"""llama.cpp's converter from safetensors to GGUF, as a program of its own.

It comes from the same source as the llama_cpp package that quantizes and loads its files; the
environment variable LLAMA_CPP_DIR names the folder with convert_hf_to_gguf.py (left out: the folder
llama.cpp in the virtual environment).

The converter runs Python code that comes with a model without asking. Unless the user trusts that
code, it is shown a view of the folder that contains none, and may not reach the Hub.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Literal

from finetune_trainer.base_model import child
from finetune_trainer.outcome import Reason, StageError

SCRIPT = "convert_hf_to_gguf.py"

log = logging.getLogger(__name__)


def convert(
    model: Path,
    target: Path,
    kind: Literal["f16", "bf16", "f32"],
    name: str,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Convert a model folder to one GGUF file. StageError(ModelUnsupported) when it can't be."""
    _run(model, target, "--outtype", kind, "--model-name", name, trusted=trust_remote_code)


def check_vocabulary(model: Path, target: Path, *, trust_remote_code: bool = False) -> None:
    """Convert configuration and tokenizer only, which takes seconds and needs no weights.

    A model or a tokenizer that llama.cpp does not know fails here, before a GPU is asked for.
    """
    _run(model, target, "--vocab-only", trusted=trust_remote_code)


def _run(model: Path, target: Path, *options: str, trusted: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="model-") as view:
        folder = model if trusted else without_code(model, Path(view))
        done = child.run(
            [sys.executable, str(_script()), str(folder), "--outfile", str(target), *options],
            environment={} if trusted else {"HF_HUB_OFFLINE": "1"},
        )
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


def without_code(model: Path, view: Path) -> Path:
    """Fill `view` with links to the model's files, without Python files and references to any."""
    for file in model.iterdir():
        if file.suffix == ".py" or not file.is_file():
            continue
        if file.suffix == ".json" and b'"auto_map"' in file.read_bytes():
            content = json.loads(file.read_bytes())
            content.pop("auto_map", None)
            (view / file.name).write_text(json.dumps(content))
        else:
            (view / file.name).symlink_to(file.resolve())
    return view


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
