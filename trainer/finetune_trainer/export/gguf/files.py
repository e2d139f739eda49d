"""All GGUF files of an export, one after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from finetune_trainer.config import Quantization
from finetune_trainer.export.gguf.choice import PROFITING, file_name, source_of
from finetune_trainer.export.gguf.convert import Model, write_sixteen
from finetune_trainer.export.gguf.quantize import quantize
from finetune_trainer.progress import Reporter


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
    types can serve it is one more, in a temporary folder beside `target`.
    """
    kinds = set(kinds)
    source_kind = source_of(kinds, model.own)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gguf-", dir=target.parent) as temporary:
        place = target if source_kind in kinds else Path(temporary)
        source = place / file_name(model.name, source_kind)
        write_sixteen(model, source, source_kind, reporter=reporter)
        yield source_kind, source
        for kind in sorted(kinds - {source_kind}, key=list(Quantization).index):
            file = target / file_name(model.name, kind)
            matrix = importance if kind in PROFITING else None
            quantize(source, file, kind, matrix, reporter=reporter)
            yield kind, file
