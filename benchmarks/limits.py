"""What each GGUF type costs a real model, in nats per token: where the gate's limits come from.

    python -m benchmarks.limits model.gguf [--types Q8_0,Q4_K_M] [--blur]

takes any GGUF file, brings it to BF16, and writes each type of that. Each is held against the BF16
file as the gate does, by its own code: the mean KL divergence over the answers of the sample data
(512 tokens at most), read as plain text.

A model that is published in few bits lies on their grid, and what rounding does to it there is no
rule for others. `--blur` adds noise of half a step of that grid, which hides it and makes a model
that quantizes badly.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt

from finetune_trainer.contract import Quantization
from finetune_trainer.export import llama
from finetune_trainer.export.gate.thresholds import limit_for
from finetune_trainer.export.gguf.files import quantize
from finetune_trainer.export.llama import CheckAnswer, CheckRequest, Reading, TokenizeRequest
from finetune_trainer.export.reference import MeasuredRow
from finetune_trainer.model.loading import available_cpus
from hack import REPOSITORY

TYPES = "F16,Q8_0,Q6_K,Q5_K_M,Q4_K_M,IQ4_XS,Q3_K_M"
DATA = REPOSITORY / "examples" / "data" / "lumora-nest.csv"
ANSWER_TOKENS = 512
STEPS = {"Q4_K": (32, 15), "Q5_0": (32, 31), "Q5_1": (32, 31), "Q5_K": (32, 31), "Q6_K": (16, 63)}
"""Weights of a block that share a scale, and the steps between its ends; of others Q8_0's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.limits")
    parser.add_argument("file", type=Path)
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--blur", action="store_true")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="limits-", dir=chosen.file.parent) as folder:
        wide, own = Path(folder, "wide.gguf"), Path(folder, "own.gguf")
        widen(chosen.file, wide)
        if chosen.blur:
            blur(wide, chosen.file)
        quantize(wide, own, Quantization.BF16)
        wide.unlink()
        rows, parameters = rows_of(own), sum(int(t.n_elements) for t in tensors(own))
        logprobs = Path(folder, "own.npy")
        compare(own, rows, None, logprobs)
        print(f"{parameters / 1e9:.2f} billion parameters, {tokens(rows)} answer tokens")
        for kind in map(Quantization, chosen.types.split(",")):
            file = Path(folder, f"{kind}.gguf")
            quantize(own, file, kind)
            found = compare(file, rows, logprobs, None).measurement
            off = sum(found.divergence) / len(found.divergence)
            print(f"{kind:8} {off:.2g}  limit {limit_for(kind, parameters):.2g}", flush=True)
            file.unlink()


def widen(source: Path, target: Path) -> None:
    """To float32, from whatever it is in."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = llama_cpp.LLAMA_FTYPE_ALL_F32, available_cpus()
    options.allow_requantize = True
    names = (str(source).encode(), str(target).encode())
    if llama_cpp.llama_model_quantize(*names, ctypes.byref(options)):
        raise SystemExit(f"llama.cpp can't read {source}")


def tensors(file: Path, mode: Any = "r") -> list[gguf.ReaderTensor]:
    return gguf.GGUFReader(file, mode).tensors


def blur(wide: Path, source: Path) -> None:
    """Add noise to the weights of a float32 file, half a step of the grid that `source` has."""
    random = np.random.default_rng(0)
    kinds = {each.name: each.tensor_type.name for each in tensors(source)}
    for each in tensors(wide, "r+"):
        if len(each.shape) > 1:
            size, steps = STEPS.get(kinds[each.name], (32, 255))
            values: npt.NDArray[Any] = each.data.reshape(-1, size)
            step = (values.max(1, keepdims=True) - values.min(1, keepdims=True)) / steps
            values += step * random.uniform(-0.5, 0.5, values.shape).astype(np.float32)


def rows_of(file: Path) -> tuple[MeasuredRow, ...]:
    """Rows of the sample data in the model's tokens, of which the answers are measured."""
    with DATA.open(newline="", encoding="utf-8") as stream:
        pairs = [(row["instruction"], row["response"]) for row in csv.DictReader(stream)]
    texts = tuple(text for ask, answer in pairs for text in (f"{ask}\n", f"{ask}\n{answer}"))
    read = llama.call(TokenizeRequest(file=file, texts=texts), Reading).tokens
    found = list[MeasuredRow]()
    for prompt, whole in zip(read[::2], read[1::2], strict=True):
        measured = tuple(range(len(prompt), len(whole)))
        if tokens(found) + len(measured) <= ANSWER_TOKENS:
            found.append(MeasuredRow(whole, measured))
    return tuple(found)


def tokens(rows: list[MeasuredRow] | tuple[MeasuredRow, ...]) -> int:
    return sum(len(row.measured) for row in rows)


def compare(
    file: Path, rows: tuple[MeasuredRow, ...], reference: Path | None, kept: Path | None
) -> CheckAnswer:
    request = CheckRequest(
        file=file,
        texts=(),
        ends=(),
        rows=rows,
        reference=reference,
        logprobs_file=kept,
        threads=available_cpus(),
    )
    return llama.call(request, CheckAnswer)


if __name__ == "__main__":
    main()
