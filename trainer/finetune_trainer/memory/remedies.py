"""What to say when memory is too small: before a training, and after memory ran out.

Before a training every suggestion is computed: only what fits with the margin is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from finetune_trainer.contract import Reason, StageError, Training, TrainingPlan
from finetune_trainer.memory.predict import Recipe, predict
from finetune_trainer.model.shape import Shape
from finetune_trainer.runtime import GIB, binary
from finetune_trainer.runtime.lifecycle import MemoryFullError

MARGIN = 1.15  # predictions are within some 10% of what was measured (docs/memory.md)
GPU_SIZES = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180, 288)  # GiB, as GPUs are sold
SHORTER = (32_768, 16_384, 8192, 4096, 2048, 1024, 512, 256)  # tokens
MODEL_SIZES = (70, 32, 14, 8, 7, 4, 3, 1.5, 1, 0.5, 0.1)  # thousand million parameters


@dataclass(frozen=True)
class Attempt:
    """A training on so many devices; what it needs depends on micro-batch and recomputation."""

    training: Training
    shape: Shape
    longest: int
    """Tokens of the longest example."""

    labels: int | None = None
    """Labels of one example at most; None: as many as tokens."""

    devices: int = 1
    parallelism: Literal["none", "ddp", "fsdp"] = "none"
    cpu: bool = False
    half: bool = True
    """Whether it computes in 16 bits, or in float32."""

    recompute_every: int = 1
    """With recomputation: one of so many layers."""

    @property
    def share(self) -> int:
        """Examples of one optimizer step on each device."""
        batch = self.training.batch_size * self.training.gradient_accumulation_steps
        return batch // self.devices

    @property
    def sequences(self) -> int:
        """Sequences that an example is: two where answers come in pairs."""
        return 2 if self.training.objective in ("dpo", "orpo") else 1

    def on_cpu(self, *, half: bool) -> Attempt:
        """The same by the processor, in bfloat16 or float32."""
        return replace(self, cpu=True, half=half)

    def needs(self, size: int, checkpointing: bool) -> int:
        """Bytes on each device for passes of `size` of the longest examples."""
        size *= self.sequences
        labels = None if self.labels is None else size * self.labels
        return self._peak(size, size * self.longest, labels, checkpointing=checkpointing)

    def needs_for(self, tokens: int, checkpointing: bool) -> int:
        """The same for passes of so many tokens, in any number of a step's examples."""
        rows = max(2, tokens // self.longest)
        labels = (
            None if self.labels is None else min(tokens, self.share * self.sequences * self.labels)
        )
        return self._peak(rows, tokens, labels, checkpointing=checkpointing)

    def _peak(self, rows: int, tokens: int, labels: int | None, *, checkpointing: bool) -> int:
        recipe = self.recipe(checkpointing=checkpointing)
        # On a CPU packed rows are attended to one by one, unless their scores are capped.
        whole = not self.cpu or self.shape.capped
        packed = self.training.packing and rows > 1 and whole
        recipe = replace(recipe, rows=rows, packed=packed)
        return predict(self.shape, recipe, tokens, labels).total

    def recipe(self, *, checkpointing: bool) -> Recipe:
        """What decides on the memory beside the passes."""
        if self.cpu:
            return Recipe.on_cpu(
                self.training,
                checkpointing=checkpointing,
                recompute_every=self.recompute_every,
                half=self.half,
            )
        shards = self.devices if self.parallelism == "fsdp" else 1
        return Recipe.on_gpu(
            self.training,
            checkpointing=checkpointing,
            recompute_every=self.recompute_every,
            shards=shards,
            buckets=self.parallelism == "ddp",
            half=self.half,
        )

    def least(self) -> int:
        """Bytes that the smallest passes need, as the spec allows them."""
        return self.needs(1, self.training.gradient_checkpointing != "never")

    def changed(self, **update: Any) -> Attempt:
        """With other settings of `training`."""
        return replace(self, training=self.training.model_copy(update=update))

    def shortened(self, length: int) -> Attempt:
        """With examples of at most `length` tokens."""
        labels = None if self.labels is None else min(self.labels, length)
        return replace(self, longest=min(self.longest, length), labels=labels)


def gpu_remedies(attempt: Attempt, memory: int) -> str:
    """What to say when nothing fits a GPU."""
    each = "each GPU" if attempt.devices > 1 else "the GPU"
    what = (
        f"The training needs {binary(attempt.least())} of GPU memory with one example of "
        f"{attempt.longest} tokens a pass, and {each} has {binary(memory)}."
    )
    options = [*_settings(attempt, memory), *_more_gpus(attempt, memory), *_gpu_size(attempt)]
    return _sentence(what, [*options, *_smaller_model(attempt, memory)])


def host_remedies(attempt: Attempt, memory: int) -> str:
    """What to say when nothing fits the memory of a pod (or machine) without a GPU."""
    what = (
        f"The training needs {binary(attempt.least())} of memory with one example of "
        f"{attempt.longest} tokens a pass, and there are {binary(memory)}."
    )
    limit = binary(round(attempt.least() * MARGIN), up=True)
    options = [f"a memory limit of {limit}", *_settings(attempt, memory)]
    return _sentence(what, [*options, *_smaller_model(attempt, memory)])


_RAISE_LIMIT = "Raise the memory limit of the stage's pod."
GENERAL_REMEDIES = {
    Reason.OUT_OF_GPU_MEMORY: "In this order: set training.batchSize to 1 (and raise "
    "gradientAccumulationSteps to match), lower training.maxSequenceLength, set training.method to "
    "qlora, or choose a smaller base model.",
    Reason.OUT_OF_MEMORY: _RAISE_LIMIT,
    Reason.OOM_KILLED: _RAISE_LIMIT,
}
BASE_MODEL_TOO_LARGE = (
    "The base model alone does not fit: choose a smaller one, set spec.training.method to qlora "
    "(or lora in place of full), or use a GPU with more memory."
)


def with_remedy(error: StageError) -> StageError:
    """Add to a MemoryFullError what helps in general. Any other error has its own remedy."""
    if not isinstance(error, MemoryFullError):
        return error
    return StageError(error.reason, f"{error.message} {GENERAL_REMEDIES[error.reason]}")


def remedies_after_ladder(
    training: Training, plan: TrainingPlan, max_sequence_length: int, *, on_gpu: bool
) -> str:
    """What is left to the user where a training with all that it may change did not fit."""
    options = []
    if not plan.gradient_checkpointing:
        options.append("set spec.training.gradientCheckpointing to auto")
    if training.min_sequence_length is None:
        options.append("allow shorter sequences by spec.training.minSequenceLength")
    elif training.min_sequence_length < max_sequence_length:
        options.append("allow more cut examples by spec.dataset.maxTruncatedRows")
    options.append("choose a smaller base model")
    if training.method == "full":
        options.append("set spec.training.method to lora")
    if training.method == "lora" and on_gpu:
        options.append("set spec.training.method to qlora")
    options.append("use a GPU with more memory" if on_gpu else "raise the pod's memory limit")
    text = "; or ".join(options)
    return f"{text[0].upper()}{text[1:]}."


def _sentence(what: str, options: list[str]) -> str:
    if not options:
        return f"{what} No setting alone makes it fit: choose a far smaller model."
    return f"{what} Any of these would do: {'; '.join(options)}."


def _fits(attempt: Attempt, memory: int) -> bool:
    return attempt.least() * MARGIN <= memory


def _settings(attempt: Attempt, memory: int) -> Iterator[str]:
    training = attempt.training
    if training.gradient_checkpointing == "never":
        other = attempt.changed(gradient_checkpointing="auto")
        if _fits(other, memory):
            yield f"gradientCheckpointing: auto ({binary(other.least())})"
    for method in {"full": ("lora", "qlora"), "lora": ("qlora",)}.get(training.method, ()):
        other = attempt.changed(method=method)
        if _fits(other, memory):
            yield f"method: {method} ({binary(other.least())})"
            break
    for length in SHORTER:
        other = attempt.shortened(length)
        if length < attempt.longest and _fits(other, memory):
            yield f"maxSequenceLength: {length} ({binary(other.least())})"
            break


def _more_gpus(attempt: Attempt, memory: int) -> Iterator[str]:
    if attempt.training.parallelism == "ddp":
        return
    for devices in (2, 4, 8):
        batch = attempt.training.batch_size * attempt.training.gradient_accumulation_steps
        if devices <= attempt.devices or batch % devices:
            continue
        other = replace(attempt, devices=devices, parallelism="fsdp")
        if _fits(other, memory):
            yield f"{devices} such GPUs, which share the model (fsdp, {binary(other.least())} each)"
            return


def _gpu_size(attempt: Attempt) -> Iterator[str]:
    for size in GPU_SIZES:
        if _fits(attempt, size * GIB):
            yield f"a GPU with {size} GiB"
            return


def _smaller_model(attempt: Attempt, memory: int) -> Iterator[str]:
    """The largest usual size of a model of like proportions that fits."""
    for size in MODEL_SIZES:
        wanted = size * 1e9
        if wanted >= attempt.shape.parameters:
            continue
        other = replace(attempt, shape=_of_size(attempt.shape, wanted))
        if _fits(other, memory):
            name = f"{size:g} billion" if size >= 1 else f"{round(size * 1000)} million"
            yield f"a model of at most {name} parameters"
            return


def _of_size(shape: Shape, parameters: float) -> Shape:
    """The shape scaled to about so many parameters (by bisection: they grow steadily)."""
    low, high = 0.01, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if shape.scaled(middle).parameters < parameters:
            low = middle
        else:
            high = middle
    return shape.scaled(high)
