"""llama.cpp's converter from safetensors to GGUF, as a program of its own."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.model import ModelFolder
from finetune_trainer.runtime import child

MARKS = ("phi-3", "phi3")  # what llama.cpp looks for in general.name (llama-vocab.cpp)


def gguf_name(name: str, folder: Path) -> str:
    """The model's name, as it has to be for llama.cpp to read text as the training did.

    Phi-3's special tokens swallow the white space behind them (rstrip). GGUF has no field for that;
    llama.cpp goes by the name. `folder` has the model's config.json and tokenizer.
    """
    known = any(mark in name.lower() for mark in MARKS)
    return name if known or not _swallows_space(folder) else f"{name} (Phi-3)"


def _swallows_space(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_bytes())
    file = folder / "tokenizer.json"
    if config.get("model_type") != "phi3" or not file.is_file():
        return False
    added = json.loads(file.read_bytes()).get("added_tokens", [])
    return any(token.get("special") and token.get("rstrip") for token in added)


SCRIPT = "convert_hf_to_gguf.py"

log = logging.getLogger(__name__)


def run(
    command: list[str],
    request: str = "",
    *,
    model: ModelFolder,
    on_progress: child.OnProgress | None = None,
    shows: child.ReadProgress | None = None,
) -> str:
    """Run a program that works with the converter, and return what it said.

    Raises StageError when it failed, by default with ModelUnsupported, and OSError when the disk is
    full.
    """
    environment = {} if model.trust_remote_code else {"HF_HUB_OFFLINE": "1"}
    if shows:
        environment["TQDM_DISABLE"] = ""
    done = child.run(command, request, environment, on_progress, shows)
    if done.status == 0:
        return done.output
    log.error("llama.cpp's converter failed:\n%s", (done.output + done.errors)[-4000:])
    if "No space left on device" in done.errors:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if refused := refusal_in(done.output):
        raise refused
    cause = done.last_line().removeprefix("ERROR:hf-to-gguf:").rstrip(" .")
    raise StageError(
        Reason.MODEL_UNSUPPORTED,
        f"llama.cpp can't convert this model to GGUF: {cause:.300}. Choose another base "
        "model, or leave spec.export.gguf empty to get the adapter and the merged model only.",
    )


_BAR = re.compile(r"Writing: .*\| *([0-9.]+)([kMGTP]?)/([0-9.]+)([kMGTP]?) ")
_UNITS = ("", "k", "M", "G", "T", "P")


def shown_bytes(line: str) -> tuple[int, int] | None:
    """Bytes done and in all, if a line is the progress bar of the converter that writes a file."""
    found = _BAR.match(line)
    if found is None:
        return None
    done, total = (round(float(found[n]) * 1000 ** _UNITS.index(found[n + 1])) for n in (1, 3))
    return done, total


def end_with(error: StageError) -> NoReturn:
    """In the program: hand an error over to the trainer, and end."""
    json.dump({"reason": error.reason, "message": error.message}, sys.stdout)
    sys.exit(1)


def refusal_in(output: str) -> StageError | None:
    """The error that a program handed over with `end_with`."""
    try:
        said = json.loads(output)
        return StageError(Reason(said["reason"]), said["message"])
    except (ValueError, KeyError, TypeError):
        return None


@contextmanager
def view_of(model: ModelFolder, name: str) -> Iterator[Path]:
    """The model's folder as the converter may see it.

    It is called `name`, since the converter takes what it writes about the model from there.
    """
    with tempfile.TemporaryDirectory(prefix="model-") as temporary:
        view = Path(temporary, name)
        if model.trust_remote_code:
            view.symlink_to(model.path.resolve())
        else:
            view.mkdir()
            without_code(model.path, view)
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
