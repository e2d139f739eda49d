"""How many bytes a training and an export take on disk.

The bits a weight of each GGUF type are llama.cpp's own: a type's blocks, and what its mixtures
(K_M) come to over whole models. Models whose width is no multiple of 256 get other blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from finetune_trainer.contract import (
    Export,
    Quantization,
    Reason,
    StageError,
    Training,
)
from finetune_trainer.contract.artifacts import PART_BYTES
from finetune_trainer.model.shape import Shape
from finetune_trainer.runtime import binary

BLOCK = 256  # weights in one block of the K types
CHECKPOINTS = 3  # two kept and one being written
GATE_BYTES = 3 * 512 * 2
"""For each token of the vocabulary: log-probabilities in 16 bits over 512 answer tokens, of base,
tuned model and largest GGUF file."""

SLACK = 256 * 2**20  # tokenizer, examples, logs, caches of datasets

_BITS: dict[Quantization, tuple[float, float]] = {
    # Of the linear layers, and of the output layer (the embedding, where they are one).
    Quantization.F32: (32, 32),
    Quantization.F16: (16, 16),
    Quantization.BF16: (16, 16),
    Quantization.Q8_0: (8.5, 8.5),
    Quantization.Q6_K: (6.5625, 6.5625),
    Quantization.Q5_K_M: (5.67, 6.5625),
    Quantization.Q4_K_M: (4.87, 6.5625),
    Quantization.IQ4_XS: (4.32, 6.5625),
    Quantization.Q3_K_M: (3.85, 6.5625),
    Quantization.IQ3_M: (3.59, 6.5625),
    Quantization.IQ3_S: (3.46, 6.5625),
    Quantization.IQ3_XS: (3.28, 6.5625),
    Quantization.IQ3_XXS: (3.08, 5.5),
    Quantization.IQ2_M: (2.7, 5.5),
    Quantization.IQ2_S: (2.48, 5.5),
    Quantization.IQ2_XS: (2.38, 5.5),
    Quantization.IQ2_XXS: (2.15, 5.5),
}
_FALLBACK: dict[Quantization, tuple[float, float]] = {
    Quantization.Q6_K: (8.5, 8.5),
    Quantization.Q5_K_M: (6.7, 8.5),
    Quantization.Q4_K_M: (5.7, 8.5),
    Quantization.IQ4_XS: (4.6, 8.5),
    Quantization.Q3_K_M: (4.9, 8.5),
    Quantization.IQ3_M: (4.6, 8.5),
    Quantization.IQ3_S: (4.6, 8.5),
    Quantization.IQ3_XS: (4.6, 8.5),
    Quantization.IQ3_XXS: (4.6, 6.0),
    Quantization.IQ2_M: (4.6, 6.0),
    Quantization.IQ2_S: (4.6, 6.0),
    Quantization.IQ2_XS: (4.6, 6.0),
    Quantization.IQ2_XXS: (4.6, 6.0),
}
_BASE_BITS = {
    Quantization.Q5_K_M: 5.5,
    Quantization.Q4_K_M: 4.5,
    Quantization.IQ4_XS: 4.25,
    Quantization.Q3_K_M: 3.4375,
    Quantization.IQ3_M: 3.4375,
    Quantization.IQ3_S: 3.4375,
    Quantization.IQ3_XS: 3.4375,
    Quantization.IQ3_XXS: 3.4375,
    Quantization.IQ2_M: 3.4375,
    Quantization.IQ2_S: 3.4375,
    Quantization.IQ2_XS: 2.625,
    Quantization.IQ2_XXS: 2.625,
}
"""Of an input embedding that is not the output layer as well."""


@dataclass(frozen=True)
class DiskNeed:
    """Bytes at the peak, by what they are for."""

    model: int
    """The base model as it is downloaded; nothing for a mounted folder."""

    work: int
    """Checkpoints and adapter, or merged model and GGUF files."""

    slack: int = SLACK

    @property
    def total(self) -> int:
        return self.model + self.work + self.slack


def downloaded(source: str, sizes: dict[str, int]) -> int:
    """Bytes of a base model that end on the pod's disk; a mounted folder is used where it is."""
    return 0 if PurePosixPath(source).is_absolute() else sum(sizes.values())


def trained_bytes(shape: Shape, training: Training) -> int:
    """What is trained, in float32: the adapter, or the whole model."""
    return 4 * (shape.parameters if training.method == "full" else shape.adapter(training.lora))


def training_disk(shape: Shape, training: Training, model_bytes: int) -> DiskNeed:
    """Checkpoints hold what is trained and two moments of it each, and with earlyStopping the best
    of it; the result is saved once for itself and once on its way to the store."""
    trained = trained_bytes(shape, training)
    parts = 3 if training.early_stopping is None else 4
    return DiskNeed(model=model_bytes, work=CHECKPOINTS * parts * trained + 2 * trained)


def export_disk(
    shape: Shape,
    training: Training,
    export: Export,
    model_bytes: int,
    own: Quantization = Quantization.BF16,
) -> DiskNeed:
    """What was trained, the merged model, GGUF files and what their gate compares.

    `own` is the 16-bit type of the model's weights: GGUF files are made of the merged model, and
    the quantizations of one in this type, both of which are temporary where nobody asked for them.
    The merged weights are gone by then. What has been uploaded leaves the disk as well; that isn't
    counted, since an upload may be slow.
    """
    trained = trained_bytes(shape, training)
    if not (export.merged or export.merged_fp8 or export.gguf):
        return DiskNeed(model=0, work=trained)
    merged, work = 2 * shape.parameters, trained
    if export.merged_fp8:
        work += merged - shape.linear
    if not export.gguf:
        return DiskNeed(model=model_bytes, work=work + (merged if export.merged else 0))
    size = {kind: gguf_bytes(shape, kind) for kind in {*export.gguf, own}}
    converted = sum(size[kind] for kind in {own, *export.gguf} & {own, Quantization.F16})
    files = sum(size.values()) + (merged if export.merged else 0)
    files += sum(size[kind] for kind in export.gguf if size[kind] > PART_BYTES)  # and its parts
    work += max(merged + converted, files) + GATE_BYTES * shape.vocabulary
    if export.adapter_gguf is not False and training.method != "full":
        work += trained
    return DiskNeed(model=model_bytes, work=work)


def file_bytes(parameters: float, kind: Quantization) -> float:
    """About the size of a GGUF file of which no more is known than its parameters."""
    return parameters * _BITS[kind][0] / 8


def gguf_bytes(shape: Shape, kind: Quantization) -> int:
    """Size of a GGUF file, without the vocabulary's few megabytes."""
    linear, output = _BITS[kind]
    embedding = _BASE_BITS.get(kind, output)
    if shape.hidden % BLOCK and kind in _FALLBACK:
        linear, output = _FALLBACK[kind]
        embedding = linear
    table = shape.vocabulary * shape.hidden
    bits = shape.linear * linear + table * output + shape.other * 32
    if not shape.tied:
        bits += table * embedding
    return round(bits / 8)


def check_disk(need: DiskNeed, available: int, what: str, remedy: str) -> None:
    """Raise StageError(OutOfDisk) when `need` is more than `available`.

    `what` is the work that needs it; `remedy` says which limit to raise.
    """
    if need.total <= available:
        return
    model = f" (the base model alone is {binary(need.model)})" if need.model else ""
    raise StageError(
        Reason.OUT_OF_DISK,
        f"{what} needs {binary(need.total)} of disk{model}, and there are {binary(available)}: "
        f"{remedy} at least {binary(need.total, up=True)}.",
    )
