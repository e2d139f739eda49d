"""Split a step into passes that fit the memory there is, at just the effective batch of the spec.

The effective batch (batchSize x gradientAccumulationSteps) decides on the result and stays. What is
chosen is its split: micro-batch x accumulation x devices. A micro-batch is planned as if all its
rows were as long as the longest, for some pass has them. Beside it there is a number of tokens that
a pass may hold in any number of rows, so that short rows make fewer passes.

Larger passes make larger matrix products, which is faster up to a point: a GPU is saturated by a
few thousand tokens, a CPU earlier. So, in this order:

1. the largest micro-batch that fits and has at most SATURATED tokens;
2. without recomputation (`gradientCheckpointing: auto`), if that micro-batch still fits;
3. then as large as fits up to USEFUL tokens;
4. as many tokens as fit beside that, up to the same limit;
5. where activations are recomputed, those of as few layers as fit beside that.

More memory never gives a smaller micro-batch. Choices leave MARGIN free; a training is refused only
when it does not fit without it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from finetune_trainer.contract import Hardware, Reason, StageError, Training, TrainingPlan
from finetune_trainer.memory.predict import model_on_host
from finetune_trainer.memory.remedies import MARGIN, Attempt, gpu_remedies, host_remedies
from finetune_trainer.model.shape import Shape
from finetune_trainer.runtime import binary

GPU_SATURATED, GPU_USEFUL = 8192, 16_384
CPU_USEFUL = 2048
FEWEST_RECOMPUTED = 8  # one of so many layers; fewer save next to nothing
HOST_PROCESS = 1 << 30  # of a process that trains on a GPU; less than it takes to start one
STAGE_PROCESS = 128 << 20  # the stage itself, beside the process that trains

Parallelism = Literal["none", "ddp", "fsdp"]


@dataclass(frozen=True)
class Lengths:
    """What of the token statistics decides on the memory. Tokens, after truncation."""

    longest: int
    """Of the longest example."""

    longest_answer: int | None = None
    """Labels of the example with most of them; None: as many as tokens."""


def plan(
    training: Training,
    shape: Shape,
    lengths: Lengths,
    hardware: Hardware,
    *,
    half: bool = True,
) -> TrainingPlan:
    """How to train on this hardware; StageError when it can't be done.

    OutOfGPUMemory or OutOfMemory when not even one example fits a pass, with what would fit;
    InvalidConfig when the effective batch can't be spread evenly over the GPUs. Where the memory
    is unknown the split stays as the spec has it, with recomputation on a GPU. `half` says whether
    GPUs compute in 16 bits; of a CPU that is known only when the pod runs, so sizes are chosen for
    float32, and what fits in bfloat16 only is not refused.
    """
    if hardware.gpus:
        check_devices(training, hardware.gpus)
        made = _on_gpus(training, shape, lengths, hardware, half=half)
        return made.model_copy(update={"memory_bytes": hardware.gpu_memory_bytes})
    made = _on_cpu(training, shape, lengths, hardware.memory_bytes)
    return made.model_copy(update={"memory_bytes": hardware.memory_bytes})


def describe(made: TrainingPlan, hardware: Hardware) -> str:
    parts = [f"{made.batch_size} examples a pass, {made.gradient_accumulation_steps} passes a step"]
    if made.pass_tokens:
        parts[0] += f", fewer where examples of together {made.pass_tokens:,} tokens make one"
    if hardware.gpus > 1:
        parts[0] += f" on each of {hardware.gpus} GPUs ({made.parallelism})"
    every = f" for one of {made.recompute_every} layers" if made.recompute_every > 1 else ""
    parts.append(f"gradient checkpointing {'on' if made.gradient_checkpointing else 'off'}{every}")
    if made.device_bytes:
        of = f" of {binary(made.memory_bytes)}" if made.memory_bytes else ""
        parts.append(f"{binary(made.device_bytes)}{of} predicted")
    return "; ".join(parts)


def check_devices(training: Training, devices: int) -> None:
    """Every device must get the same share of an optimizer step."""
    batch = effective_batch(training)
    if batch % devices == 0:
        return
    fewer = max(d for d in _divisors(batch) if d < devices)
    near = sorted({max(1, batch // devices) * devices, -(-batch // devices) * devices})
    raise StageError(
        Reason.INVALID_CONFIG,
        f"The effective batch of {batch} examples (batchSize {training.batch_size} x "
        f"gradientAccumulationSteps {training.gradient_accumulation_steps}) can't be spread evenly "
        f"over {devices} GPUs: make it {' or '.join(map(str, near))}, or ask for {fewer} "
        f"GPU{'s' if fewer > 1 else ''}.",
    )


def check_host(shape: Shape, hardware: Hardware, attempt: Attempt) -> None:
    """A GPU's process needs some memory of the pod; with fsdp the whole model passes through it."""
    limit, need = hardware.memory_bytes, _host_bytes(shape, hardware.gpus, attempt)
    if limit is not None and need > limit:
        raise StageError(
            Reason.OUT_OF_MEMORY,
            f"The training's processes need {binary(need)} of memory beside that of the GPUs, and "
            f"the pod has {binary(limit)}: set stages.train.resources.limits.memory to at least "
            f"{binary(need, up=True)}.",
        )


def training_memory(
    training: Training, shape: Shape, lengths: Lengths, gpus: int, made: TrainingPlan
) -> int | None:
    """Bytes that the training's pod should take, that of GPUs apart; for what it requests."""
    if gpus:
        kind = made.parallelism
        attempt = Attempt(training, shape, lengths.longest, devices=gpus, parallelism=kind)
        return STAGE_PROCESS + _host_bytes(shape, gpus, attempt)
    return None if made.device_bytes is None else STAGE_PROCESS + made.device_bytes


def _host_bytes(shape: Shape, gpus: int, attempt: Attempt) -> int:
    need = gpus * HOST_PROCESS
    if attempt.training.method == "full":
        need += _host_bytes_of_full(shape, attempt)
    elif attempt.parallelism == "fsdp":
        need += model_on_host(shape, attempt.recipe(checkpointing=True))
    return need


def _host_bytes_of_full(shape: Shape, attempt: Attempt) -> int:
    """Weights pass through the host's memory when they are saved, and with fsdp the optimizer's
    state as well; with earlyStopping the best weights stay there. In float32."""
    numbers = 2 if attempt.parallelism == "fsdp" else 1
    best = 1 if attempt.training.early_stopping else 0
    return 4 * (numbers + best) * shape.parameters


def effective_batch(training: Training) -> int:
    """Examples in one optimizer step."""
    return training.batch_size * training.gradient_accumulation_steps


def _on_gpus(
    training: Training, shape: Shape, lengths: Lengths, hardware: Hardware, *, half: bool
) -> TrainingPlan:
    memory, devices = hardware.gpu_memory_bytes, hardware.gpus
    attempts = [
        Attempt(training, shape, lengths.longest, devices=devices, parallelism=kind, half=half)
        for kind in _parallelisms(training, devices)
    ]
    if memory is None:
        check_host(shape, hardware, attempts[0])
        return _as_written(training, attempts[0])
    for attempt in attempts:
        chosen = _choose(attempt, memory, GPU_SATURATED, GPU_USEFUL)
        if chosen is not None:
            check_host(shape, hardware, attempt)
            return chosen
    raise StageError(Reason.OUT_OF_GPU_MEMORY, gpu_remedies(attempts[-1], memory))


def _on_cpu(training: Training, shape: Shape, lengths: Lengths, memory: int | None) -> TrainingPlan:
    attempt = Attempt(training, shape, lengths.longest, labels=_labels(training, lengths))
    attempt = attempt.on_cpu(half=False)
    if memory is None:
        return _as_written(training, attempt)
    chosen = _choose(attempt, memory, CPU_USEFUL, CPU_USEFUL)
    if chosen is not None:
        return chosen
    smaller = attempt.on_cpu(half=True)
    if smaller.least() > memory:
        raise StageError(Reason.OUT_OF_MEMORY, host_remedies(smaller, memory))
    checkpointing = training.gradient_checkpointing != "never"
    return _made(smaller, 1, checkpointing=checkpointing)


def _labels(training: Training, lengths: Lengths) -> int:
    """Rows that are padded compute logits wherever any of them has a label."""
    if not training.packing or lengths.longest_answer is None:
        return lengths.longest
    return lengths.longest_answer


def _parallelisms(training: Training, devices: int) -> list[Parallelism]:
    if devices == 1:
        return ["none"]
    if training.lora.modules_to_save or training.lora.target_parameters:
        return ["ddp"]  # prepare_stage.check_config
    return ["ddp", "fsdp"] if training.parallelism == "auto" else [training.parallelism]


def _choose(attempt: Attempt, memory: int, saturated: int, useful: int) -> TrainingPlan | None:
    """The plan for `memory` bytes a device; None when nothing fits."""
    longest, share = attempt.longest * attempt.sequences, attempt.share
    ladder = [size for size in _divisors(share) if size == 1 or size * longest <= useful]
    wish = attempt.training.gradient_checkpointing
    most_saving = wish != "never"

    def made(size: int, tokens: int, *, checkpointing: bool) -> TrainingPlan:
        room = memory / MARGIN
        return _made(attempt, size, checkpointing=checkpointing, memory=room, useful=tokens)

    def largest(sizes: list[int], *, checkpointing: bool) -> int | None:
        fitting = (s for s in reversed(sizes) if attempt.needs(s, checkpointing) * MARGIN <= memory)
        return next(fitting, None)

    if wish != "auto":
        size = largest(ladder, checkpointing=most_saving)
        if size is not None:
            return made(size, useful, checkpointing=most_saving)
    else:
        low = [size for size in ladder if size == 1 or size * longest <= saturated]
        size = largest(low, checkpointing=True)
        if size is not None:
            kept = largest(ladder, checkpointing=False)
            if kept is not None and kept >= size:
                return made(kept, useful, checkpointing=False)
            return _keep_layers(made(size, saturated, checkpointing=True), attempt, memory)
    # Nothing fits with the margin: the least that there is may still do without it.
    if attempt.needs(1, most_saving) <= memory:
        return _made(attempt, 1, checkpointing=most_saving)
    return None


def _made(
    attempt: Attempt, size: int, *, checkpointing: bool, memory: float = 0, useful: int = 0
) -> TrainingPlan:
    """Passes of `size` examples; of up to `useful` tokens where those fit `memory` as well."""
    least, tokens = attempt.needs(size, checkpointing), 0
    if size < attempt.share:
        most = min(max(useful, size * attempt.longest), attempt.share * attempt.longest)
        tokens = _most_tokens(attempt, max(memory, least), most, checkpointing=checkpointing)
    return TrainingPlan(
        batch_size=size,
        gradient_accumulation_steps=attempt.share // size,
        gradient_checkpointing=checkpointing,
        pass_tokens=tokens or None,
        parallelism=attempt.parallelism,
        device_bytes=max(least, attempt.needs_for(tokens, checkpointing) if tokens else 0),
    )


def _keep_layers(made: TrainingPlan, attempt: Attempt, memory: int) -> TrainingPlan:
    """The plan with as few layers computed again as fit the memory beside its passes."""
    for every in range(min(FEWEST_RECOMPUTED, attempt.shape.layers), 1, -1):
        keeping = replace(attempt, recompute_every=every)
        need = keeping.needs(made.batch_size, checkpointing=True)
        if made.pass_tokens:
            need = max(need, keeping.needs_for(made.pass_tokens, checkpointing=True))
        if need * MARGIN <= memory:
            return made.model_copy(update={"recompute_every": every, "device_bytes": need})
    return made


def _most_tokens(attempt: Attempt, memory: float, most: int, *, checkpointing: bool) -> int:
    """The largest number of tokens up to `most` that passes may have in `memory` bytes; or 0."""
    fitting, above = 0, most + 1
    while above - fitting > 1:
        middle = (fitting + above) // 2
        if attempt.needs_for(middle, checkpointing) <= memory:
            fitting = middle
        else:
            above = middle
    return fitting


def _as_written(training: Training, attempt: Attempt) -> TrainingPlan:
    """The spec's own split, where nothing says what fits; on a GPU memory is short more often."""
    size = max(d for d in _divisors(attempt.share) if d <= training.batch_size)
    wish = training.gradient_checkpointing
    checkpointing = wish == "always" or (wish == "auto" and not attempt.cpu)
    return _made(attempt, size, checkpointing=checkpointing)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
