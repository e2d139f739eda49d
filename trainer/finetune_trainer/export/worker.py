"""llama.cpp's library at work, in a process of its own: a JSON request in, a JSON answer out.

    {"do": "quantize", "source": …, "target": …, "type": …, "threads": …}      -> {}
    {"do": "ask", "file": …, "prompt": …, "limit": …, "threads": …, "ends": […]}
        -> {"tokens": […], "stopsAt": […], "answer": …, "stopped": …, "finite": …,
            "template": …}
    {"do": "tokenize", "file": …, "texts": […]}
        -> {"tokens": [[…]], "addsBos": …}

`tokens` are the prompt's ids as the file's own tokenizer makes them, `stopsAt` those of `ends` at
which llama.cpp ends an answer. `tokenize` adds what the file says is to be added to a text.
"""

from __future__ import annotations

import ctypes
import json
import logging
import sys
from typing import Any

import llama_cpp
import numpy as np


def quantize(request: dict[str, Any]) -> dict[str, Any]:
    """Write a 16-bit GGUF file as another type."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{request['type']}")
    options.nthread = request["threads"]
    status = llama_cpp.llama_model_quantize(
        request["source"].encode(), request["target"].encode(), ctypes.byref(options)
    )
    if status != 0:
        sys.exit(f"llama_model_quantize returned {status}")
    return {}


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """Put a question to a GGUF file, with greedy decoding."""
    prompt = request["prompt"].encode()
    model = llama_cpp.Llama(
        model_path=request["file"],
        n_ctx=len(prompt) + request["limit"] + 8,  # there are never more tokens than bytes
        n_threads=request["threads"],
        n_threads_batch=request["threads"],
        n_gpu_layers=0,
        verbose=False,
    )
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    tokens = model.tokenize(prompt, add_bos=False, special=True)
    answer: list[int] = []
    stopped, finite = False, True
    for token in model.generate(tokens, temp=0.0, repeat_penalty=1.0):
        finite = finite and _finite_logits(model)
        stopped = llama_cpp.llama_vocab_is_eog(vocabulary, token)
        if stopped or not finite:
            break
        answer.append(token)
        if len(answer) == request["limit"]:
            break
    stops_at = [t for t in request["ends"] if llama_cpp.llama_vocab_is_eog(vocabulary, t)]
    return {
        "tokens": tokens,
        "stopsAt": stops_at,
        "answer": model.detokenize(answer).decode(errors="replace"),
        "stopped": stopped,
        "finite": finite,
        "template": model.metadata.get("tokenizer.chat_template", ""),
    }


def tokenize(request: dict[str, Any]) -> dict[str, Any]:
    """Texts in tokens, as a server makes them of a rendered prompt."""
    model = llama_cpp.Llama(model_path=request["file"], vocab_only=True, verbose=False)
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    return {
        "tokens": [model.tokenize(t.encode(), special=True) for t in request["texts"]],
        "addsBos": bool(llama_cpp.llama_vocab_get_add_bos(vocabulary)),
    }


def _finite_logits(model: llama_cpp.Llama) -> bool:
    logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return bool(np.isfinite(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),))).all())


def main() -> None:
    """Do what standard input asks for."""
    # llama.cpp reports every tensor; only its errors are worth a line.
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    request = json.load(sys.stdin)
    answer = {"quantize": quantize, "ask": ask, "tokenize": tokenize}[request["do"]](request)
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
