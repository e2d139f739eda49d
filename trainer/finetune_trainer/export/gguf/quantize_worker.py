"""llama.cpp's quantizer at work, in a process of its own.

A JSON request on standard input:

    {"source": …, "target": …, "type": …, "threads": …, "bufferBytes": …,
     "importance": file or null}
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from pathlib import Path
from typing import Any

import llama_cpp

from finetune_trainer.export.gguf import importance_file
from finetune_trainer.runtime import child

_ERROR = 4  # ggml_log_level
_SIZE = re.compile(r"^size = +([0-9.]+) MiB")


def main() -> None:
    """Do what standard input asks for."""
    request = json.load(sys.stdin)
    listener = listen(Path(request["source"]).stat().st_size)
    llama_cpp.llama_log_set(listener, ctypes.c_void_p(0))
    options = llama_cpp.llama_model_quantize_default_params()
    prefix = "ALL" if request["type"] == "F32" else "MOSTLY"
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{prefix}_{request['type']}")
    options.nthread = request["threads"]
    options.max_buf_size = request["bufferBytes"]
    matrix = importance_file.read(Path(request["importance"])) if request["importance"] else None
    if matrix:
        options.imatrix = matrix.data
        options.kv_overrides = matrix.notes
    status = llama_cpp.llama_model_quantize(
        request["source"].encode(), request["target"].encode(), ctypes.byref(options)
    )
    if status != 0:
        sys.exit("it could not be written or holds values that the type can't" if status else "")


def listen(total: int) -> Any:
    """A receiver of llama.cpp's log: sizes of tensors become progress, errors are passed on."""
    done = 0.0

    def receive(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        nonlocal done
        said = text.decode(errors="replace")
        if size := _SIZE.match(said):
            done += float(size[1]) * 2**20
            child.say_progress(min(round(done), total), total)
        elif level == _ERROR:
            sys.stderr.write(said)

    return llama_cpp.llama_log_callback(receive)


if __name__ == "__main__":
    main()
