"""Plain: one type, as llama-quantize does."""

from __future__ import annotations

import ctypes
import sys

import llama_cpp


def quantize(source: str, target: str, kind: str) -> None:
    """llama-quantize's own defaults."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options))
    sys.exit(status)


if __name__ == "__main__":
    quantize(*sys.argv[1:])
