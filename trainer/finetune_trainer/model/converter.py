"""llama.cpp's converter to GGUF, a program of its own, and its rehearsal in `prepare`.

A safetensors file begins with the names, types and shapes of its tensors. This header, followed by
a hole of the right size, stands in for the file: llama.cpp's converter reads values only to write
them, and a dry run writes nothing. So whatever it doesn't know shows within seconds, be it the
architecture, the tokenizer or a tensor, before any weights are fetched. Then llama.cpp splits texts
with the converted vocabulary.

That happens in a process of its own, this module as a program: a RehearsalRequest comes as JSON on
standard input, and a RehearsalAnswer goes to standard output.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import runpy
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from pydantic import TypeAdapter

from finetune_trainer.contract import Base, Reason, StageError, Storage
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.base_model import BaseModelFiles, is_hub, read_hub_header
from finetune_trainer.runtime import child
from finetune_trainer.store import Folder, open_folder

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


# --- The rehearsal -------------------------------------------------------------------------------

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WORKER = "finetune_trainer.model.converter"  # this module as a program
LENGTH_BYTES = 8  # the header's length comes first, little-endian
FIRST_BYTES = 1 << 18  # holds the header of most files
MAX_HEADER = 100_000_000  # safetensors' own limit
CONNECTIONS = 8


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors file says about one tensor."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


Header = dict[str, TensorHeader]
"""Of a safetensors file: its tensors by name."""

_HEADER = TypeAdapter(Header)

Headers = dict[str, Header]
"""Headers by file."""


class RehearsalRequest(Base):
    """What to convert, and what to tokenize with the result."""

    llama: Path
    """Folder of llama.cpp's converter."""

    model: Path
    """The model as the converter may see it."""

    name: str
    target: Path
    """A GGUF file for configuration and vocabulary."""

    texts: tuple[str, ...]
    """Special tokens are written out in them."""


class RehearsalAnswer(Base):
    """How llama.cpp splits the texts."""

    tokens: tuple[list[int], ...]


def rehearse(model: ModelFolder, name: str, target: Path, texts: Sequence[str]) -> list[list[int]]:
    """Convert a model, whose weights may be stand-ins; returns how llama.cpp splits the texts.

    The file `target` gets configuration and vocabulary. Raises StageError(ModelUnsupported) where
    llama.cpp can't do it.
    """
    with view_of(model, "model") as view:
        request = RehearsalRequest(
            llama=llama_folder(),
            model=view,
            name=gguf_name(name, model.path),
            target=target,
            texts=tuple(texts),
        )
        answer = run([sys.executable, "-m", WORKER], request.model_dump_json(), model=model)
    return [*RehearsalAnswer.model_validate_json(answer).tokens]


def with_stand_ins(
    files: BaseModelFiles, headers: Headers, small: ModelFolder, target: Path
) -> ModelFolder:
    """Fill the folder `target` with links to the files in `small`, and a stand-in of each weight.

    A mounted folder, which has its weights, is returned as it is.
    """
    if small.path == Path(files.model.source):
        return small
    target.mkdir(parents=True)
    for name in files.small():
        (target / name).symlink_to((small.path / name).resolve())
    for name, header in headers.items():
        write_stand_in(header, target / name)
    return replace(small, path=target)


def write_stand_in(header: Header, target: Path) -> int:
    """A safetensors file whose values are a hole: it has its size, and takes no space.

    Returns where the values begin, a multiple of 8 bytes.
    """
    text = _HEADER.dump_json(header)
    text += b" " * (-len(text) % LENGTH_BYTES)
    ends = [tensor.data_offsets[1] for tensor in header.values()]
    with target.open("wb") as stream:
        begin = stream.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        stream.truncate(begin + max(ends, default=0))
    return begin


def read_headers(files: BaseModelFiles, storage: Storage) -> Headers:
    """The headers of all weights; raises StageError(ModelUnsupported) or the store's reasons."""
    names = files.weights()
    with ThreadPoolExecutor(CONNECTIONS, "headers") as pool:
        return dict(zip(names, pool.map(lambda n: _header(files, storage, n), names), strict=True))


def tensor_names(headers: Headers) -> list[str]:
    return [name for header in headers.values() for name in header]


def _header(files: BaseModelFiles, storage: Storage, name: str) -> Header:
    source = files.model.source
    try:
        if is_hub(source):
            found = read_hub_header(source, files.commit or files.model.revision, name)
        else:
            found = read_header(open_folder(source, storage), name)
        return as_header(found)
    except ValueError as error:
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            f"{name} of {source} is no safetensors file: upload the model again, or correct "
            "spec.model.source.",
        ) from error


def as_header(found: dict[str, Any]) -> Header:
    """The tensors of a header as JSON has it; ValueError where it is none."""
    return _HEADER.validate_python({k: v for k, v in found.items() if k != "__metadata__"})


def weight_files(folder: Path) -> list[str]:
    """The files with weights."""
    if not (folder / INDEX).is_file():
        return [SINGLE] if (folder / SINGLE).is_file() else []
    return sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))


def local_header(file: Path) -> tuple[int, Header]:
    """Where the values begin, and the header; StageError(ModelUnsupported) where it has none."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            return LENGTH_BYTES + length, as_header(json.loads(stream.read(length)))
    except (ValueError, MemoryError, OverflowError, FileNotFoundError) as error:
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            f"The base model's {file.name} is no safetensors file: upload the model again, or "
            "correct spec.model.source.",
        ) from error


def read_header(folder: Folder, name: str) -> dict[str, Any]:
    """The JSON that a safetensors file begins with; ValueError where it begins with none."""
    start = folder.read_start(name, FIRST_BYTES)
    end = LENGTH_BYTES + int.from_bytes(start[:LENGTH_BYTES], "little")
    if len(start) < end <= MAX_HEADER:
        start = folder.read_start(name, end)
    found = json.loads(start[LENGTH_BYTES:end])
    if not isinstance(found, dict):
        raise ValueError(f"{name} begins with no header")  # noqa: TRY004 - the file is wrong
    return found


def main() -> None:
    request = RehearsalRequest.model_validate_json(sys.stdin.read())
    with redirect_stdout(sys.stderr):
        # Its own gguf-py goes before the package of that name, which may be of another version.
        sys.path[:0] = [str(request.llama), str(request.llama / "gguf-py")]
        for mode in ("--dry-run", "--vocab-only"):
            convert(request, mode)
        tokens = tokenize(request.target, request.texts)
    sys.stdout.write(RehearsalAnswer(tokens=tokens).model_dump_json())


def convert(request: RehearsalRequest, mode: str) -> None:
    """Run the converter; where it can't convert, it ends this process with a status above 0."""
    script = str(request.llama / SCRIPT)
    named = ["--outfile", str(request.target), "--model-name", request.name]
    sys.argv = [script, str(request.model), *named, mode]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


def tokenize(file: Path, texts: tuple[str, ...]) -> tuple[list[int], ...]:
    import llama_cpp  # noqa: PLC0415 - native code, which only this needs

    model = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    try:
        return tuple(list(model.tokenize(t.encode(), add_bos=False, special=True)) for t in texts)
    finally:
        model.close()


if __name__ == "__main__":
    main()
