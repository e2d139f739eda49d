"""How long an export takes, what memory its gate takes, and the bytes on disk. Pure.

The rates are those of one CPU, measured on AMD EPYC with AVX2 (benchmarks/README.md, "Export").
They are good to a factor of two on other machines; what counts more is how parts compare.

The bits a weight of each GGUF type are llama.cpp's own: a type's blocks, and what its mixtures
(K_M) come to over whole models. Models whose width is no multiple of 256 get other blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from finetune_trainer.contract import (
    Export,
    Quantization,
    Reason,
    StageError,
    Training,
    is_mounted,
)
from finetune_trainer.contract.artifacts import PART_BYTES
from finetune_trainer.model.shape import Shape
from finetune_trainer.runtime import binary

# Rates of one CPU.
LLAMA_FLOPS = 95e9
"""llama.cpp on F16, Q8_0 and Q4_K_M (95, 94 and 111) in passes of hundreds of tokens."""
REFERENCE_FLOPS = 56e9
"""torch in float32, weights converted block by block on the way."""
QUANTIZE_SECONDS = 65e-9
"""For a weight, Q4_K_M."""
IMPORTANCE_TOKENS = 16_384

# Of the whole machine.
DISK_RATE = 250e6
"""Bytes a second, of a usual volume."""
NETWORK_RATE = 100e6
"""Bytes a second: 1 Gbit/s."""
WRITE_RATE = 500e6
"""Bytes a second that are merged, or converted: one CPU's work beside the disk's."""
MEMORY_RATE = 10e9
"""Bytes a second: what an answer's next token waits for."""
PROCESS_SECONDS = 6.0
"""For a process to import torch or llama.cpp."""

TOKENS = 2048
"""That a file is measured on: 512 of answers, and their prompts."""
ANSWERS = 512
PASS_TOKENS, PASS_ANSWERS = 1024, 128
"""Of one forward pass of the reference."""
UBATCH = 1024
"""Tokens for which llama.cpp reads the weights once."""
ADAPTER_TOKENS = 512
SAMPLE_STEPS = 2 * 128
"""Tokens of an answer, by two models; all answers of one go side by side."""
SAMPLE_TOKENS = 2 * 1500
"""Of all prompts, by two models."""
MOST_SAMPLE_SECONDS = 2 * 300.0

SOURCE = "source"


@dataclass(frozen=True)
class Machine:
    cpus: int
    memory: float = math.inf
    """Bytes in which files that were read stay."""


@dataclass(frozen=True)
class ExportWork:
    """What has to be done."""

    parameters: float
    export: Export
    own: Quantization = Quantization.BF16
    """The 16-bit type of the model's weights."""

    adapter: bool = True
    downloads: bool = True

    @property
    def source_bytes(self) -> float:
        return file_bytes(self.parameters, self.own)

    @property
    def derived(self) -> tuple[Quantization, ...]:
        """Types that are made after the first file."""
        return tuple(kind for kind in self.export.gguf if kind is not self.own)

    @property
    def flops(self) -> float:
        """Of a token."""
        return 2 * self.parameters


def forecast(work: ExportWork, machine: Machine) -> dict[str, float]:
    """Seconds of each part, by its name, in their order."""
    return dict(_parts(work, machine))


def _parts(work: ExportWork, machine: Machine) -> Iterator[tuple[str, float]]:
    export, source = work.export, work.source_bytes
    verify = export.verify != "off"
    yield "fetch", source / NETWORK_RATE if work.downloads else 0.0
    if export.merged_fp8:
        passes = 2 if verify else 1  # read back
        yield "fp8", PROCESS_SECONDS + passes * source / WRITE_RATE
    if export.merged or export.gguf:
        yield "merge", PROCESS_SECONDS + source / WRITE_RATE
    if verify and (export.merged or export.gguf):
        yield "reference", reference_seconds(work, machine)
    if export.gguf:
        yield f"write {SOURCE}", PROCESS_SECONDS + source / WRITE_RATE
        yield f"check {SOURCE}", check_seconds(work, machine, work.own) if verify else 0.0
        if verify and work.adapter and export.adapter_gguf is not False:
            yield "check adapter", check_seconds(work, machine, work.own, ADAPTER_TOKENS)
    if export.measures_importance:
        flops = work.flops * IMPORTANCE_TOKENS
        yield "importance", PROCESS_SECONDS + flops / (REFERENCE_FLOPS * machine.cpus)
    for kind in work.derived:
        seconds = QUANTIZE_SECONDS * work.parameters / machine.cpus
        if kind is Quantization.F16:
            seconds = source / WRITE_RATE
        yield f"write {kind}", PROCESS_SECONDS + seconds
        yield f"check {kind}", check_seconds(work, machine, kind) if verify else 0.0
    if verify and export.gguf:
        yield "samples", sample_seconds(work, machine)
    yield "upload", upload_seconds(work)


def reference_seconds(work: ExportWork, machine: Machine) -> float:
    """Base and tuned model share passes; the merged model has its own."""
    models = 2 + work.export.merged
    flops = models * TOKENS * work.flops
    passes = max(math.ceil(TOKENS / PASS_TOKENS), math.ceil(ANSWERS / PASS_ANSWERS))
    reads = passes * (1 + work.export.merged)
    computed = flops / (REFERENCE_FLOPS * machine.cpus)
    return PROCESS_SECONDS + max(computed, read_seconds(work.source_bytes, reads, machine))


def check_seconds(
    work: ExportWork, machine: Machine, kind: Quantization, tokens: int = TOKENS
) -> float:
    """llama.cpp loads a file, looks at all of it, and measures it."""
    computed = work.flops * tokens / (LLAMA_FLOPS * max(1, machine.cpus // 2))
    reads = 1 + math.ceil(tokens / UBATCH)
    size = file_bytes(work.parameters, kind)
    return PROCESS_SECONDS + max(computed, read_seconds(size, reads, machine))


def sample_seconds(work: ExportWork, machine: Machine) -> float:
    """Answers of the smallest file."""
    size = min(file_bytes(work.parameters, kind) for kind in {*work.export.gguf, work.own})
    threads = max(1, machine.cpus // 2)
    reading = work.flops * SAMPLE_TOKENS / (LLAMA_FLOPS * threads)
    rate = MEMORY_RATE if size <= machine.memory else DISK_RATE
    writing = SAMPLE_STEPS * size / rate
    return PROCESS_SECONDS + min(MOST_SAMPLE_SECONDS, reading + writing)


def upload_seconds(work: ExportWork) -> float:
    """Of the last file: the others are uploaded meanwhile."""
    kinds = work.export.gguf or (work.own,)
    return min(file_bytes(work.parameters, kind) for kind in kinds) / NETWORK_RATE


def read_seconds(size: float, reads: int, machine: Machine) -> float:
    """What is read from the disk again and again, since it doesn't stay in memory."""
    return size * reads / DISK_RATE if size > machine.memory else 0.0


# --- Memory --------------------------------------------------------------------------------------

MIB = 1 << 20
STAGE_BYTES = 340 * MIB
"""Of a process that has imported torch and transformers: the stage itself, the converter, ..."""
LIGHT_BYTES = 120 * MIB
"""Of one that runs llama.cpp."""
QUANTIZING_BYTES = 2 * (LIGHT_BYTES + 64 * MIB)
"""Two types at a time, with the rows that each has in work."""
ROW_ANSWERS = 128
"""Answer tokens of a row that are compared at a time."""
LOGITS_BYTES = 256 * MIB
"""The most that llama.cpp keeps of one call."""
REFERENCE_BYTES = 150 * MIB
"""A block of weights in float32, and what loading a model leaves."""
CONVERTING_BYTES = 8
"""For each value of the largest tensor while the converter writes it: in float32, and in 16 bits
twice. Measured on 7 billion parameters with a vocabulary of 128,256: 7.9."""


@dataclass(frozen=True)
class Widths:
    """What of a model decides how much the gate takes, in elements."""

    vocabulary: int
    hidden: int
    mlp: int
    key_value: int
    """Key-value heads times their width."""

    layers: int


def llama_bytes(widths: Widths, tokens: int = TOKENS) -> int:
    """Memory of its own that llama.cpp takes to measure a file, beside the process.

    Logits are there twice (in the graph and for the caller), a row's in float32 four times more.
    """
    answers = min(ANSWERS, LOGITS_BYTES // (4 * max(1, widths.vocabulary)))
    logits = 4 * widths.vocabulary * (2 * answers + 4.3 * ROW_ANSWERS)
    cache = 2 * 2 * tokens * widths.key_value * widths.layers
    activations = 4 * UBATCH * (2 * widths.mlp + 4 * widths.hidden)
    return round(logits + cache + activations)


def reference_bytes(widths: Widths, tokens: int = 2 * PASS_TOKENS) -> int:
    """Memory of its own that the reference takes, beside the process; `tokens` of one pass, base
    and tuned model together."""
    logits = 6 * 4 * widths.vocabulary * PASS_ANSWERS
    activations = 4 * tokens * (4 * widths.mlp + 6 * widths.hidden)
    return round(REFERENCE_BYTES + logits + activations)


def export_bytes(widths: Widths, export: Export, largest: int, experts: int = 0) -> int:
    """Memory for all processes of an export, beside mapped files.

    `largest` is the number of values that the converter has in memory at a time; `experts` the
    bytes of stacked experts, which transformers doesn't map.
    """
    phases = [STAGE_BYTES]  # that merges
    if export.gguf:
        phases += [STAGE_BYTES + CONVERTING_BYTES * largest, QUANTIZING_BYTES]
    if export.verify != "off" and (export.gguf or export.merged):
        phases.append(STAGE_BYTES + reference_bytes(widths) + experts)
    if export.verify != "off" and export.gguf:
        # The adapter's file is made beside the first check, types that follow beside the others.
        beside = max(STAGE_BYTES, QUANTIZING_BYTES)
        phases.append(LIGHT_BYTES + llama_bytes(widths) + beside)
    if export.measures_importance:
        phases.append(STAGE_BYTES + reference_bytes(widths, 512) + experts)
    return STAGE_BYTES + max(phases)


def export_memory(shape: Shape, export: Export) -> int:
    """The same by config.json alone, before there are weights."""
    widths = Widths(shape.vocabulary, shape.hidden, shape.mlp, shape.key_value, shape.layers)
    if not shape.experts:
        return export_bytes(widths, export, shape.hidden * max(shape.vocabulary, shape.mlp))
    # gpt-oss's files hold all experts of a layer in two tensors, which are mapped; others' each
    # expert by itself, which transformers and the converter stack.
    stacked = shape.model_type == "gpt_oss"
    width = shape.mlp // shape.active * (2 if stacked else 1)
    largest = shape.hidden * max(shape.vocabulary, shape.experts * width)
    return export_bytes(widths, export, largest, 0 if stacked else 2 * shape.all_experts)


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
    return 0 if is_mounted(source) else sum(sizes.values())


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
