"""llama.cpp's library at work, in a process of its own: a JSON request in, a JSON answer out.

    {"do": "tokenize", "file": …, "texts": […]}
        -> {"tokens": [[…]], "addsBos": …, "addsEos": …, "stopsAt": []}
    {"do": "check", "file": …, "texts": […], "ends": […],
     "rows": [{"ids": […], "measured": […]}], "against": …, "write": …,
     "adapter": null, "scale": …, "threads": …}
        -> what `tokenize` says, and the figures of logprobs.Measured
    {"do": "answer", "file": …, "prompts": [[…]], "limit": …, "seconds": …, "adapter": null,
     "scale": …, "threads": …}
        -> {"answers": [{"text": …, "tokens": …, "stopped": …}]}

`tokens` are the ids as the file's own tokenizer makes them, `stopsAt` those of `ends` at which
llama.cpp ends an answer. `tokenize` adds what the file says is to be added to a text; `check`
takes texts as they are. `check` wants every block of every tensor to be finite, holds the
log-probabilities of the rows' measured tokens against those in the file `against`, and keeps them
in the file `write`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from finetune_trainer.export.llama.session import CACHE_BYTES, UBATCH, Session, greedy, groups
from finetune_trainer.export.reference import logprobs


def tokenize(request: dict[str, Any]) -> dict[str, Any]:
    """Texts in tokens, as a server makes them of a rendered prompt."""
    session = Session(request["file"], threads=1, vocabulary_only=True)
    return _read(session, request["texts"], [], add_special=True)


def check(request: dict[str, Any]) -> dict[str, Any]:
    """Load a file with all its tensors, tokenize texts, and score rows, if there are any."""
    rows = [(row["ids"], row["measured"]) for row in request["rows"]]
    session = Session(request["file"], request["threads"], check=True)
    longest = max((len(ids) for ids, _ in rows), default=UBATCH)
    outputs = max((len(measured) for _, measured in rows), default=1)
    _open(session, request, longest, outputs=outputs)
    return {
        **_read(session, request["texts"], request["ends"], add_special=False),
        **_score(session, rows, request["against"], request["write"]),
    }


def _read(
    session: Session, texts: list[str], ends: list[int], *, add_special: bool
) -> dict[str, Any]:
    return {
        "tokens": [session.tokens(text, add_special=add_special) for text in texts],
        "addsBos": bool(llama_cpp.llama_vocab_get_add_bos(session.vocabulary)),
        "addsEos": bool(llama_cpp.llama_vocab_get_add_eos(session.vocabulary)),
        "stopsAt": [token for token in ends if session.ends(token)],
    }


def _score(
    session: Session,
    rows: list[tuple[list[int], list[int]]],
    against: str | None,
    write: str | None,
) -> dict[str, Any]:
    reference = logprobs.read(Path(against)) if against else None
    total = sum(len(positions) for _, positions in rows)
    target = logprobs.create(Path(write), total, session.size) if write else None
    measured, done = logprobs.Measured(), 0
    for ids, positions in rows:
        session.forget()
        wanted = {position - 1 for position in positions}
        batch = [(token, at, 0, at in wanted) for at, token in enumerate(ids[: positions[-1]])]
        logits = np.stack(list(session.run(batch)))
        beside = None if reference is None else reference[done : done + len(positions)]
        values = measured.add(logits, [ids[position] for position in positions], beside)
        if target is not None and values is not None:
            logprobs.store(target, done, values)
        done += len(positions)
    return measured.figures()


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Let the model answer prompts, given as tokens, with greedy decoding."""
    prompts, limit = request["prompts"], request["limit"]
    session = Session(request["file"], request["threads"])
    most = CACHE_BYTES // max(1, session.bytes_per_token)
    found = []
    for group in groups(prompts, limit, most):
        _open(session, request, sum(len(prompt) + limit for prompt in group), len(group))
        found += greedy(session, group, limit, request["seconds"] * len(group) / len(prompts))
        session.close()
    return {
        "answers": [
            {"text": session.text(tokens), "tokens": len(tokens), "stopped": ended}
            for tokens, ended in found
        ]
    }


def _open(
    session: Session, request: dict[str, Any], length: int, sequences: int = 1, outputs: int = 1
) -> None:
    session.open(length=length, sequences=sequences, outputs=outputs)
    if request["adapter"]:
        session.apply(request["adapter"], request["scale"])


def main() -> None:
    """Do what standard input asks for."""
    # llama.cpp reports every tensor; only its errors are worth a line.
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    request = json.load(sys.stdin)
    json.dump(_WORK[request["do"]](request), sys.stdout)


_WORK: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "tokenize": tokenize,
    "check": check,
    "answer": answer,
}


if __name__ == "__main__":
    main()
