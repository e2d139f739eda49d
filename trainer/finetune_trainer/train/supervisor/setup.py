"""Adapts a training to the machine: its GPUs, how a step is split for them, engine and trackers.

`claim_gpus` asks what is here. The other functions take what it found and decide.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

from finetune_trainer.contract import (
    ALL_LINEAR,
    Hardware,
    Lora,
    Notice,
    NoticeCode,
    Reason,
    RunConfig,
    StageError,
    TargetModule,
    Tracker,
    Training,
    TrainingPlan,
)
from finetune_trainer.memory.gpus import Gpu, check_gpus, describe_gpus
from finetune_trainer.memory.machine import find_gpus
from finetune_trainer.memory.plan import Lengths, describe, effective_batch, plan
from finetune_trainer.model.shape import Shape, context_length, number_type
from finetune_trainer.train.link import Engine, TrainingWork, fallback_notice

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryNeeds:
    """What the memory that a training takes depends on."""

    shape: Shape | None
    """None where the widths of the model are not known."""

    longest: int
    """Tokens of the longest example, as it is trained on."""


def adapt_to_machine(
    work: TrainingWork, needs: MemoryNeeds, gpus: tuple[Gpu, ...]
) -> tuple[TrainingWork, list[Notice]]:
    """The work as this machine will do it, and what people should know about it.

    Raises StageError: InvalidConfig where the spec asks for what this machine can't do,
    OutOfGPUMemory where its GPUs are too small.
    """
    training = work.config.training
    check_trackers(training.report_to, os.environ)
    devices = count_devices(len(gpus), os.environ)
    planned = plan_for_gpus(work.config, work.plan, needs, gpus)
    divided, processes = divide_step(training, planned, devices)
    if devices > 1:
        log.info(
            "%d of %d devices train (%s): %d x %d examples each in a step",
            processes,
            devices,
            divided.parallelism,
            divided.gradient_accumulation_steps,
            divided.batch_size,
        )
    choice = choose_engine(
        work.config,
        gpus=gpus,
        processes=processes,
        model_type=read_model_type(work.model.path),
        missing=missing_for_unsloth() if gpus else None,
    )
    notices = [beyond_context(needs.longest, context_length(work.model.path))]
    notice = choice.notice(training.engine)
    if choice.obstacle and notice is None:
        log.info("Engine: %s (%s)", choice.engine, choice.obstacle)
    else:
        log.info("Engine: %s", choice.engine)
    update = {"plan": divided, "processes": processes, "engine": choice.engine}
    return work.model_copy(update=update), [each for each in (*notices, notice) if each]


def beyond_context(longest: int, context: int | None) -> Notice | None:
    """What people should know where an example has more tokens than the model was made for."""
    if context is None or longest <= context:
        return None
    return Notice(
        code=NoticeCode.BEYOND_CONTEXT,
        evidence=f"the longest example has {longest} tokens, and the model was made for {context} "
        "(max_position_embeddings)",
        remedy=f"Set spec.training.maxSequenceLength to {context} or less, or take a model with a "
        "longer context: beyond it, models answer poorly.",
    )


# --- Devices -----------------------------------------------------------------------------------

PROCESSES_VARIABLE = "FINETUNE_PROCESSES"  # processes on a machine without a GPU; for tests


def claim_gpus(config: RunConfig) -> tuple[Gpu, ...]:
    """The GPUs that train. Raises StageError(GpuUnavailable) where the pod was given more.

    A CPU would take days for what holds a GPU all the while.
    """
    wanted = config.hardware.gpus if config.hardware else 0
    found = find_gpus(wanted)
    check_gpus(wanted, found)
    for line in describe_gpus(found) if found.present else ():
        log.info("%s", line)
    if found.present and not found.usable:
        log.warning("The training runs on the CPU")
    return found.usable


def count_devices(gpus: int, environment: Mapping[str, str]) -> int:
    """Each GPU is one; a CPU is one, unless the variable says otherwise."""
    if gpus:
        return gpus
    value = environment.get(PROCESSES_VARIABLE, "1")
    return max(int(value), 1) if value.isdecimal() else 1


# --- The plan: how a step is split into passes and processes -----------------------------------


def read_needs(model: Path, summary: bytes) -> MemoryNeeds:
    """Read the base model's folder, and what `prepare` left as summary.json."""
    return MemoryNeeds(Shape.of_model(model), int(json.loads(summary)["tokens"]["max"]))


def plan_for_gpus(
    config: RunConfig, prepared: TrainingPlan, needs: MemoryNeeds, gpus: Sequence[Gpu]
) -> TrainingPlan:
    """The plan of `prepare` where it knew what a GPU holds, else one for the GPUs that are here.

    `prepare` takes GPUs to compute in 16 bits; for those that don't, there is a plan of their own.
    The effective batch stays. Raises StageError(OutOfGPUMemory) when not even one example fits a
    pass, with the changes that would fit.
    """
    known = config.hardware
    if not gpus or needs.shape is None:
        return prepared
    least = min(gpu.capability for gpu in gpus)
    half = number_type(least, needs.shape.model_type) != "float32"
    if half and known is not None and known.gpus and prepared.memory_bytes is not None:
        return prepared
    hardware = Hardware(
        gpus=count_processes(config.training, len(gpus)),
        gpu_memory_bytes=min(gpu.memory_bytes for gpu in gpus),
        memory_bytes=known.memory_bytes if known else None,
    )
    made = plan(config.training, needs.shape, Lengths(needs.longest), hardware, half=half)
    log.info("Plan for this pod's %s: %s", gpus[0].name, describe(made, hardware))
    return made


def count_processes(training: Training, devices: int) -> int:
    """The most of so many devices that can share an optimizer step evenly."""
    batch = effective_batch(training)
    return next(n for n in range(min(devices, batch), 0, -1) if batch % n == 0)


def divide_step(
    training: Training, planned: TrainingPlan, devices: int
) -> tuple[TrainingPlan, int]:
    """What each process does of a step, and how many processes there are (at most `devices`).

    Their number divides the effective batch (batchSize x gradientAccumulationSteps), and a pass
    holds at most as many rows as `planned` found to fit. Raises StageError(InvalidConfig) when
    fewer processes than devices would have to hold a model that was to be spread over all of them.
    """
    batch, processes = effective_batch(training), count_processes(training, devices)
    parallelism = planned.parallelism
    if parallelism == "none" and processes > 1:
        parallelism = "fsdp" if training.parallelism == "fsdp" else "ddp"
    if parallelism == "fsdp":
        _check_fsdp(batch, processes, devices)
    share = batch // processes
    rows = next(n for n in range(min(planned.batch_size, share), 0, -1) if share % n == 0)
    split = {
        "batch_size": rows,
        "gradient_accumulation_steps": share // rows,
        "parallelism": parallelism if processes > 1 else "none",
    }
    return planned.model_copy(update=split), processes


def _check_fsdp(batch: int, processes: int, devices: int) -> None:
    if processes < devices:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"A model spread over {devices} GPUs (training.parallelism fsdp) needs an effective "
            f"batch (batchSize x gradientAccumulationSteps, here {batch}) that {devices} divides: "
            f"set training.gradientAccumulationSteps to a multiple of {devices}.",
        )


# --- The engine --------------------------------------------------------------------------------

# Model types with kernels of Unsloth's own (unsloth/models/loader.py, 2026.10). All others go
# through a general path that compiles transformers' code.
UNSLOTH_MODEL_TYPES = frozenset({"llama", "mistral", "gemma", "gemma2", "qwen2", "qwen3"})
UNSLOTH_TARGETS = {ALL_LINEAR, *(each.value for each in TargetModule)}
UNSLOTH_CAPABILITY = (7, 0)  # Volta: the oldest that its Triton kernels run on


@dataclass(frozen=True)
class EngineChoice:
    """The engine, and why it is not Unsloth where the spec allows or asks for it."""

    engine: Engine
    obstacle: str | None = None

    def notice(self, wanted: str) -> Notice | None:
        """What people should know: nothing where they left the choice to `auto`."""
        if self.obstacle is None or wanted != "unsloth":
            return None
        return fallback_notice(f"Unsloth can't train here: {self.obstacle}")


def choose_engine(
    config: RunConfig,
    *,
    gpus: tuple[Gpu, ...],
    processes: int,
    model_type: str | None,
    missing: str | None,
) -> EngineChoice:
    """Unsloth where it can run. `missing` is what its installation lacks."""
    if config.training.engine == "transformers":
        return EngineChoice("transformers")
    if not gpus:
        return EngineChoice("transformers", "there is no NVIDIA GPU")
    if (objective := config.training.objective) != "sft":
        return EngineChoice("transformers", f"it learns answers only, and not {objective}")
    only_adapters = "here it trains adapters only" if config.training.method == "full" else None
    obstacle = missing or only_adapters or _unsloth_obstacle(config, gpus[0], processes, model_type)
    return EngineChoice("unsloth" if obstacle is None else "transformers", obstacle)


def _unsloth_obstacle(
    config: RunConfig, gpu: Gpu, processes: int, model_type: str | None
) -> str | None:
    if processes > 1:
        return f"it trains on one GPU, and here are {processes}"
    if gpu.capability < UNSLOTH_CAPABILITY:
        major, minor = gpu.capability
        return f"{gpu.name} has compute capability {major}.{minor}, and it needs 7.0"
    if config.model.trust_remote_code:
        return "the model brings its own code (trustRemoteCode)"
    if model_type not in UNSLOTH_MODEL_TYPES:
        known = ", ".join(sorted(UNSLOTH_MODEL_TYPES))
        return f"the model type {model_type} has no fast path in it ({known} have)"
    return _foreign_layers(config.training.lora)


def _foreign_layers(lora: Lora) -> str | None:
    """What of the adapter Unsloth doesn't know."""
    if lora.modules_to_save:
        return "it trains no modules as a whole here (training.lora.modulesToSave)"
    if lora.target_parameters:
        return "it adapts no experts here (training.lora.targetParameters)"
    if other := set(lora.target_modules) - UNSLOTH_TARGETS:
        return f"it adapts no layers by other names ({', '.join(sorted(other)):.200})"
    return None


def missing_for_unsloth() -> str | None:
    """What keeps Unsloth from being imported: that it, or a version it asks for, isn't there."""
    try:
        wanted = [Requirement(text) for text in requires("unsloth") or ()]
        unsloth = version("unsloth")
    except PackageNotFoundError:
        return "this image has no Unsloth (build it with the extra unsloth)"
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            return f"Unsloth {unsloth} needs {requirement.name}, which isn't installed"
        # The public part: 2.13.0+cpu is 2.13.0.
        if not requirement.specifier.contains(found.partition("+")[0], prereleases=True):
            return f"Unsloth {unsloth} needs {requirement}, and {found} is installed"
    return None


def read_model_type(folder: Path) -> str | None:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name = found.get("model_type") if isinstance(found, dict) else None
    return name if isinstance(name, str) else None


# --- Trackers ----------------------------------------------------------------------------------

TRACKER_PACKAGES = {
    Tracker.TENSORBOARD: ("tensorboardX", "tensorboard"),
    Tracker.MLFLOW: ("mlflow",),
    Tracker.WANDB: ("wandb",),
}

TRACKER_VARIABLES = {
    Tracker.TENSORBOARD: (),
    Tracker.MLFLOW: ("MLFLOW_", "HF_MLFLOW_", "DATABRICKS_"),
    Tracker.WANDB: ("WANDB_",),
}
"""How the names of the variables begin that each is set up by, credentials among them."""


def check_trackers(
    report_to: Iterable[Tracker], environment: Mapping[str, str], home: Path | None = None
) -> None:
    """Raise StageError(InvalidConfig) for a tracker that isn't installed or has no address."""
    for tracker in report_to:
        field, packages = f"training.reportTo names {tracker}", TRACKER_PACKAGES[tracker]
        if not any(find_spec(package) for package in packages):
            raise StageError(
                Reason.INVALID_CONFIG,
                f"{field}, and this trainer image has no package {packages[0]}: use an image "
                f"built with the extra trackers, or leave {tracker} out.",
            )
        if tracker is Tracker.MLFLOW and not environment.get("MLFLOW_TRACKING_URI"):
            raise StageError(
                Reason.INVALID_CONFIG,
                f"{field}, and MLFLOW_TRACKING_URI isn't set: set it to the server's address in "
                "stages.train.env.",
            )
        if tracker is Tracker.WANDB and not _knows_wandb(environment, home or Path.home()):
            raise StageError(
                Reason.INVALID_CONFIG,
                f"{field}, and WANDB_API_KEY isn't set: set it from a Secret in stages.train.env, "
                "or WANDB_MODE to offline.",
            )


def _knows_wandb(environment: Mapping[str, str], home: Path) -> bool:
    if environment.get("WANDB_MODE", "online") not in ("online", "shared"):
        return True
    named = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    return any(environment.get(name) for name in named) or (home / ".netrc").exists()
