"""A process that tries llama.cpp's converter and tokenizer on a model with stand-in weights.

A RehearsalRequest comes as JSON on standard input; a RehearsalAnswer goes to standard output.
"""

from __future__ import annotations

import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path

from finetune_trainer.contract import Base
from finetune_trainer.model.converter import SCRIPT


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
