"""All GGUF files of an export: their names, and which is made of which."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from finetune_trainer.contract import Quantization
from finetune_trainer.export.gguf.convert import Model, write_sixteen
from finetune_trainer.export.gguf.quantize import quantize
from finetune_trainer.runtime import child
from finetune_trainer.runtime.progress import Reporter

PROFITING = (
    Quantization.Q6_K,
    Quantization.Q5_K_M,
    Quantization.Q4_K_M,
    Quantization.IQ4_XS,
    Quantization.Q3_K_M,
)
"""Types whose blocks llama.cpp fits with an importance matrix, the more so the fewer bits they have
(ggml-quants.c; its Q8_0 ignores one). None of them needs it."""


MODELFILE = "Modelfile"  # names the preferred file

SMALL = 2_000_000_000  # parameters; below, four bits cost much quality
_LARGE_FIRST = (Quantization.Q4_K_M, Quantization.Q5_K_M, Quantization.Q6_K, Quantization.Q8_0)
_SMALL_FIRST = (Quantization.Q8_0, Quantization.Q6_K, Quantization.F16, Quantization.BF16)


def file_name(model: str, quantization: Quantization) -> str:
    """The name that people know from the Hub, e.g. Llama-3.2-1B-Q4_K_M.gguf."""
    return f"{model}-{quantization}.gguf"


def adapter_file_name(model: str) -> str:
    """The name of the adapter's own file, e.g. Llama-3.2-1B-LoRA-F32.gguf."""
    return f"{model}-LoRA-{Quantization.F32}.gguf"


def preferred(kinds: Iterable[Quantization], parameters: float) -> Quantization:
    """The file that most people would serve; small models lose much by four bits."""
    order = _SMALL_FIRST if parameters < SMALL else _LARGE_FIRST
    return min(kinds, key=lambda kind: order.index(kind) if kind in order else len(order))


def source_of(kinds: Iterable[Quantization], own: Quantization) -> Quantization:
    """The type of the file that all others are made of.

    That is one of the files asked for, so that nothing is written but them: of the model's own
    16-bit type if possible, else of the other one, else F32. Where none is, a temporary file of the
    model's own type is needed.
    """
    asked = set(kinds)
    for kind in (own, Quantization.F16, Quantization.BF16, Quantization.F32):
        if kind in asked:
            return kind
    return own


AT_A_TIME = 2
"""Quantizations. One computes while the other reads, writes, or is checked by the caller."""


def write_files(
    model: Model,
    target: Path,
    kinds: Iterable[Quantization],
    *,
    importance: Path | None = None,
    reporter: Reporter | None = None,
) -> Iterator[tuple[Quantization, Path]]:
    """Write one file for each type to the folder `target`, and give each when it is complete.

    The first is the one that the others are made of, then the largest first. Where none of the
    types can serve it is one more, in a temporary folder beside `target`. The others are begun when
    the caller asks for the second; `importance` has to be there by then.
    """
    kinds = set(kinds)
    source_kind = source_of(kinds, model.own)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gguf-", dir=target.parent) as temporary:
        place = target if source_kind in kinds else Path(temporary)
        source = place / file_name(model.name, source_kind)
        write_sixteen(model, source, source_kind, reporter=reporter)
        yield source_kind, source
        others = {
            kind: target / file_name(model.name, kind)
            for kind in sorted(kinds - {source_kind}, key=list(Quantization).index)
        }
        yield from quantize_all(source, others, importance, reporter)


def quantize_all(
    source: Path,
    targets: dict[Quantization, Path],
    importance: Path | None = None,
    reporter: Reporter | None = None,
) -> Iterator[tuple[Quantization, Path]]:
    """Write `source` as each of the types, and give the files in their order."""
    with ThreadPoolExecutor(AT_A_TIME, "quantize") as pool:
        jobs = []
        for kind, file in targets.items():
            matrix = importance if kind in PROFITING else None
            work = partial(quantize, source, file, kind, matrix, reporter=reporter)
            jobs.append(pool.submit(work))
        try:
            for job, (kind, file) in zip(jobs, targets.items(), strict=True):
                job.result()
                yield kind, file
        except BaseException:  # also when the caller wants no more
            pool.shutdown(wait=False, cancel_futures=True)
            child.kill_running()
            raise
