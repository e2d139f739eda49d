"""GGUF files: converted once by llama.cpp's converter, then quantized through its library."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Literal

import gguf

from finetune_trainer.base_model import converter
from finetune_trainer.base_model.loading import available_cpus
from finetune_trainer.config import Quantization
from finetune_trainer.export import llama
from finetune_trainer.export.merge import parameters_dtype
from finetune_trainer.outcome import Reason, StageError
from finetune_trainer.progress import Reporter


def file_name(model: str, quantization: Quantization) -> str:
    """The name that people know from the Hub, e.g. Llama-3.2-1B-Q4_K_M.gguf."""
    return f"{model}-{quantization}.gguf"


def write_gguf(
    merged: Path,
    target: Path,
    model: str,
    quantizations: tuple[Quantization, ...],
    reporter: Reporter,
    *,
    begins_with_bos: bool = True,
    trust_remote_code: bool = False,
) -> list[Path]:
    """Write one file per quantization to the folder `target`, the largest first.

    The merged model's own 16-bit type is converted without loss; all others are made of that file.
    Without `begins_with_bos` the files tell servers not to put that token before a prompt, as some
    tokenizers do although their chat template doesn't: the training never saw it.
    """
    target.mkdir(parents=True, exist_ok=True)
    own = Quantization.BF16 if parameters_dtype(merged) == "bfloat16" else Quantization.F16
    master = target / file_name(model, own)
    reporter.message(f"Converting to GGUF ({own})")
    kind_name: Literal["bf16", "f16"] = "bf16" if own is Quantization.BF16 else "f16"
    converter.convert(merged, master, kind_name, model, trust_remote_code=trust_remote_code)
    if not begins_with_bos:
        set_add_bos(master, False)
    files = []
    for kind in sorted(quantizations, key=list(Quantization).index):
        file = target / file_name(model, kind)
        if kind is not own:
            reporter.message(f"Quantizing to {kind}")
            quantize(master, file, kind)
        files.append(file)
    if own not in quantizations:
        master.unlink()
    return files


def set_add_bos(file: Path, add: bool) -> None:
    """Change in place whether a server puts the beginning-of-sequence token before a text.

    A file that does not say so is left as it is.
    """
    field = gguf.GGUFReader(file, "r+").get_field("tokenizer.ggml.add_bos_token")
    if field is not None and bool(field.parts[field.data[0]][0]) is not add:
        field.parts[field.data[0]][0] = add


def quantize(source: Path, target: Path, kind: Quantization) -> None:
    """Write `source`, a 16-bit GGUF file, as another type."""
    try:
        llama.call(
            do="quantize",
            source=str(source),
            target=str(target),
            type=kind.value,
            threads=available_cpus(),
        )
    except llama.LlamaError as error:
        if shutil.disk_usage(target.parent).free < source.stat().st_size // 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            f"llama.cpp can't quantize this model to {kind}: {error} Leave it out of "
            "spec.export.gguf.",
        ) from error
