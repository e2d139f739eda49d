"""The conversion to GGUF, rehearsed before any weights are fetched.

A safetensors file begins with the names, types and shapes of its tensors. This header, followed by
a hole of the right size, stands in for the file: llama.cpp's converter reads values only to write
them, and a dry run writes nothing. So whatever it doesn't know shows within seconds, be it the
architecture, the tokenizer or a tensor. Then llama.cpp splits texts with the converted vocabulary.

That happens in a process of its own, this module as a program: a RehearsalRequest comes as JSON on
standard input, and a RehearsalAnswer goes to standard output.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from finetune_trainer.contract import Base, Reason, StageError, Storage
from finetune_trainer.model import ModelFolder, converter
from finetune_trainer.model.base_model import BaseModelFiles, is_hub, read_hub_header
from finetune_trainer.model.converter import SCRIPT, gguf_name
from finetune_trainer.store import Folder, open_folder

WORKER = "finetune_trainer.model.rehearsal"  # this module as a program
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
    with converter.view_of(model, "model") as view:
        request = RehearsalRequest(
            llama=converter.llama_folder(),
            model=view,
            name=gguf_name(name, model.path),
            target=target,
            texts=tuple(texts),
        )
        answer = converter.run(
            [sys.executable, "-m", WORKER], request.model_dump_json(), model=model
        )
    return [*RehearsalAnswer.model_validate_json(answer).tokens]


def with_stand_ins(
    files: BaseModelFiles, headers: Headers, small: ModelFolder, target: Path
) -> ModelFolder:
    """Fill the folder `target` with links to the files in `small`, and a stand-in of each weight.

    A mounted folder, which has its weights, is returned as it is.
    """
    if files.model.source.startswith("/"):
        return small
    target.mkdir(parents=True)
    for name in files.small():
        (target / name).symlink_to((small.path / name).resolve())
    for name, header in headers.items():
        write_stand_in(header, target / name)
    return replace(small, path=target)


def write_stand_in(header: Header, target: Path) -> None:
    """A safetensors file whose values are a hole: it has its size, and takes no space."""
    text = _HEADER.dump_json(header)
    ends = [tensor.data_offsets[1] for tensor in header.values()]
    with target.open("wb") as stream:
        stream.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        stream.truncate(stream.tell() + max(ends, default=0))


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
