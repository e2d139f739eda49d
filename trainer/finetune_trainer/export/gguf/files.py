"""All GGUF files of an export."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from finetune_trainer.base_model import child
from finetune_trainer.config import Quantization
from finetune_trainer.export.gguf.choice import PROFITING, file_name, source_of
from finetune_trainer.export.gguf.convert import Model, write_sixteen
from finetune_trainer.export.gguf.quantize import quantize
from finetune_trainer.progress import Reporter

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
