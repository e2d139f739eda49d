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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from finetune_trainer.base_model import child
from finetune_trainer.outcome import Reason, StageError

SCRIPT = "convert_hf_to_gguf.py"

log = logging.getLogger(__name__)


def run(
    command: list[str],
    request: str = "",
    *,
    trusted: bool,
    on_progress: child.OnProgress | None = None,
) -> str:
    """Run a program that works with the converter, and return what it said.

    Raises StageError when it failed, by default with ModelUnsupported, and OSError when the disk is
    full.
    """
    environment = {} if trusted else {"HF_HUB_OFFLINE": "1"}
    done = child.run(command, request, environment, on_progress)
    if done.status == 0:
        return done.output
    log.error("llama.cpp's converter failed:\n%s", (done.output + done.errors)[-4000:])
    if "No space left on device" in done.errors:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if refused := _refusal(done.output):
        raise refused
    cause = done.last_line().removeprefix("ERROR:hf-to-gguf:").rstrip(" .")
    raise StageError(
        Reason.MODEL_UNSUPPORTED,
        f"llama.cpp can't convert this model to GGUF: {cause:.300}. Choose another base "
        "model, or leave spec.export.gguf empty to get the adapter and the merged model only.",
    )


def refuse(error: StageError) -> NoReturn:
    """In the program: hand an error over to the trainer, and end."""
    json.dump({"reason": error.reason, "message": error.message}, sys.stdout)
    sys.exit(1)


def _refusal(output: str) -> StageError | None:
    try:
        said = json.loads(output)
        return StageError(Reason(said["reason"]), said["message"])
    except (ValueError, KeyError, TypeError):
        return None


@contextmanager
def shown(model: Path, name: str, *, trusted: bool) -> Iterator[Path]:
    """The model's folder as the converter may see it.

    It is called `name`, since the converter takes what it writes about the model from there.
    """
    with tempfile.TemporaryDirectory(prefix="model-") as temporary:
        view = Path(temporary, name)
        if trusted:
            view.symlink_to(model.resolve())
        else:
            view.mkdir()
            without_code(model, view)
        yield view


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


def llama_folder() -> Path:
    """Where the converter is. StageError(InvalidConfig) when it isn't there."""
    # `make build` links the folder into the virtual environment; the image sets the variable.
    folder = Path(os.environ.get("LLAMA_CPP_DIR") or Path(sys.prefix) / "llama.cpp")
    if not (folder / SCRIPT).is_file():
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{folder} is not the folder with llama.cpp's {SCRIPT}: use the project's trainer "
            "image or `make build`, or name it in LLAMA_CPP_DIR.",
        )
    return folder
