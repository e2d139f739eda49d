"""llama.cpp's converter and tokenizer on a model whose weights are stand-ins.

    {"llama": folder of the converter, "folder": the model, "name": …, "target": …, "texts": […]}

as JSON on standard input; {"tokens": [[…], …]} comes back, one list of token ids for each text. The
file `target` gets configuration and vocabulary.
"""

from __future__ import annotations

import json
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from finetune_trainer.model.converter import SCRIPT


def main() -> None:
    """Do what standard input asks for."""
    request = json.load(sys.stdin)
    with redirect_stdout(sys.stderr):
        # Its own gguf-py goes before the package of that name, which may be of another version.
        sys.path[:0] = [request["llama"], f"{request['llama']}/gguf-py"]
        for mode in ("--dry-run", "--vocab-only"):
            convert(request, mode)
        tokens = tokenize(Path(request["target"]), request["texts"])
    json.dump({"tokens": tokens}, sys.stdout)


def convert(request: dict[str, Any], mode: str) -> None:
    """Run the converter; it ends this program with another status than 0 when it can't."""
    script = f"{request['llama']}/{SCRIPT}"
    named = ["--outfile", request["target"], "--model-name", request["name"]]
    sys.argv = [script, request["folder"], *named, mode]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


def tokenize(file: Path, texts: list[str]) -> list[list[int]]:
    """The tokens of texts, in which special tokens are written out."""
    import llama_cpp  # noqa: PLC0415 - native code, which only this needs

    model = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    try:
        return [list(model.tokenize(t.encode(), add_bos=False, special=True)) for t in texts]
    finally:
        model.close()


if __name__ == "__main__":
    main()
