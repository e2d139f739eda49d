"""What a training runs on: devices, engine, and how a step is split for them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from finetune_trainer.contract import (
    Hardware,
    Notice,
    Reason,
    RunConfig,
    StageError,
    Tracker,
    Training,
    TrainingPlan,
)
from finetune_trainer.memory.plan import Lengths, describe, effective_batch, plan
from finetune_trainer.model.shape import Shape
from finetune_trainer.train.link.work import Work, fallback_notice

GPU_PROBE = "finetune_trainer.train.recipe.gpu_probe"
PROBE_SECONDS = 120.0  # a cold CUDA driver takes up to half a minute

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gpu:
    """One of them."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    """CUDA compute capability, e.g. (9, 0) for an H100."""


def visible_gpus(dev: Path = Path("/dev")) -> tuple[Gpu, ...]:
    """NVIDIA GPUs, as torch counts them (CUDA_VISIBLE_DEVICES, MIG and driver considered)."""
    if not any(dev.glob("nvidia[0-9]*")) and not (dev / "dxg").exists():  # dxg: WSL
        return ()
    command = [sys.executable, "-m", GPU_PROBE]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=True
        )
        return parse(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError, TypeError) as error:
        log.warning("The GPUs can't be counted, training on one device: %s", error)
        return ()


def parse(output: str) -> tuple[Gpu, ...]:
    """The last line of the probe's output; raises ValueError or TypeError when it is none."""
    found = json.loads(output.strip().splitlines()[-1])
    return tuple(Gpu(g["name"], g["memory_bytes"], tuple(g["capability"])) for g in found)


Engine = Literal["transformers", "unsloth"]

# Model types with kernels of Unsloth's own (unsloth/models/loader.py, 2026.10); all others go
# through a general path that compiles transformers' code.
MODEL_TYPES = frozenset({"llama", "mistral", "gemma", "gemma2", "qwen2", "qwen3"})
LEAST_CAPABILITY = (7, 0)  # Volta: the oldest that its Triton kernels run on


@dataclass(frozen=True)
class Choice:
    """The engine, and why it is not Unsloth where that was wished for."""

    engine: Engine
    obstacle: str | None = None

    def notice(self, wanted: str, gpus: int) -> Notice | None:
        """What people should know: nothing where `auto` trains on a CPU, as it always does."""
        if self.obstacle is None or (wanted == "auto" and gpus == 0):
            return None
        return fallback_notice(f"Unsloth can't train here: {self.obstacle}")


def choose(
    config: RunConfig,
    *,
    gpus: tuple[Gpu, ...],
    processes: int,
    model_type: str | None,
    missing: str | None,
) -> Choice:
    """Unsloth where it can run; `missing` is what its installation lacks."""
    wanted = config.training.engine
    if wanted == "transformers":
        return Choice("transformers")
    obstacle = _obstacle(config, gpus, processes, model_type, missing)
    return Choice("unsloth") if obstacle is None else Choice("transformers", obstacle)


def _obstacle(
    config: RunConfig,
    gpus: tuple[Gpu, ...],
    processes: int,
    model_type: str | None,
    missing: str | None,
) -> str | None:
    if not gpus:
        return "there is no NVIDIA GPU"
    major, minor = gpus[0].capability
    known = ", ".join(sorted(MODEL_TYPES))
    obstacles = [
        (missing is not None, missing or ""),
        (processes > 1, f"it trains on one GPU, and here are {processes}"),
        (
            gpus[0].capability < LEAST_CAPABILITY,
            f"{gpus[0].name} has compute capability {major}.{minor}, and it needs 7.0",
        ),
        (config.model.trust_remote_code, "the model brings its own code (trustRemoteCode)"),
        (
            model_type not in MODEL_TYPES,
            f"the model type {model_type} has no fast path in it ({known} have)",
        ),
    ]
    return next((text for applies, text in obstacles if applies), None)


def missing_for_unsloth() -> str | None:
    """What keeps Unsloth from being imported: that it, or a version it asks for, isn't there."""
    try:
        wanted = [Requirement(text) for text in requires("unsloth") or ()]
        own = version("unsloth")
    except PackageNotFoundError:
        return "this image has no Unsloth (build it with the extra unsloth)"
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            return f"Unsloth {own} needs {requirement.name}, which isn't installed"
        # The public part: 2.13.0+cpu is 2.13.0.
        if not requirement.specifier.contains(found.partition("+")[0], prereleases=True):
            return f"Unsloth {own} needs {requirement}, and {found} is installed"
    return None


def model_type_of(folder: Path) -> str | None:
    """The model_type of config.json."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name = found.get("model_type") if isinstance(found, dict) else None
    return name if isinstance(name, str) else None


@dataclass(frozen=True)
class Needs:
    """What decides on the memory that a training takes."""

    shape: Shape | None
    """None where the widths of the model are not known."""

    longest: int
    """Tokens of the longest example, as it is trained on."""


def read_needs(model: Path, summary: bytes) -> Needs:
    """From the folder of the base model, and what `prepare` left as summary.json."""
    shape = Shape.from_config(json.loads((model / "config.json").read_bytes()))
    return Needs(shape, int(json.loads(summary)["tokens"]["max"]))


def plan_for(
    config: RunConfig, prepared: TrainingPlan, needs: Needs, gpus: Sequence[Gpu]
) -> TrainingPlan:
    """The plan of `prepare` where it knew what a GPU holds, else one for the GPUs that are here.

    The effective batch stays. Raises StageError(OutOfGPUMemory) when not even one example fits a
    pass, with the changes that would fit.
    """
    told = config.hardware
    if not gpus or (told is not None and told.gpus and prepared.memory_bytes is not None):
        return prepared
    if needs.shape is None:
        return prepared
    hardware = Hardware(
        gpus=processes_for(config.training, len(gpus)),
        gpu_memory_bytes=min(gpu.memory_bytes for gpu in gpus),
        memory_bytes=told.memory_bytes if told else None,
    )
    made = plan(config.training, needs.shape, Lengths(needs.longest), hardware)
    log.info("Plan for this pod's %s: %s", gpus[0].name, describe(made, hardware))
    return made


def settle(work: Work, needs: Needs) -> tuple[Work, list[Notice]]:
    """The work as it will be done here, and what people should know about it.

    Raises StageError: InvalidConfig where the spec asks for what this machine can't do,
    OutOfGPUMemory where its GPUs are too small.
    """
    training = work.config.training
    check_trackers(training.report_to, os.environ)
    gpus = visible_gpus()
    wanted = processes_wanted(len(gpus), os.environ)
    planned = plan_for(work.config, work.plan, needs, gpus)
    plan, processes = divide(training, planned, wanted)
    if wanted > 1:
        log.info(
            "%d of %d devices train (%s): %d x %d examples each in a step",
            processes,
            wanted,
            plan.parallelism,
            plan.gradient_accumulation_steps,
            plan.batch_size,
        )
    choice = choose(
        work.config,
        gpus=gpus,
        processes=processes,
        model_type=model_type_of(work.model),
        missing=missing_for_unsloth() if gpus else None,
    )
    notice = choice.notice(training.engine, len(gpus))
    if choice.obstacle and notice is None:
        log.info("Engine: %s (%s)", choice.engine, choice.obstacle)
    else:
        log.info("Engine: %s", choice.engine)
    settled = work.model_copy(
        update={"plan": plan, "processes": processes, "engine": choice.engine}
    )
    return settled, [notice] if notice else []


PROCESSES_VARIABLE = "FINETUNE_PROCESSES"
"""Processes on a machine without a GPU; for tests."""


def processes_wanted(gpus: int, environment: Mapping[str, str]) -> int:
    """One process for each GPU; one on a CPU, unless the variable says otherwise."""
    if gpus:
        return gpus
    value = environment.get(PROCESSES_VARIABLE, "1")
    return max(int(value), 1) if value.isdecimal() else 1


def processes_for(training: Training, devices: int) -> int:
    """The most of so many devices that can share an optimizer step evenly."""
    batch = effective_batch(training)
    return next(n for n in range(min(devices, batch), 0, -1) if batch % n == 0)


def divide(training: Training, plan: TrainingPlan, devices: int) -> tuple[TrainingPlan, int]:
    """What each process does of a step, and how many processes there are (at most `devices`).

    Their number divides the effective batch (batchSize x gradientAccumulationSteps), and a pass
    holds at most as many rows as `plan` found to fit. Raises StageError(InvalidConfig) when fewer
    processes than devices would have to hold a model that was to be spread over all of them.
    """
    batch, processes = effective_batch(training), processes_for(training, devices)
    parallelism = plan.parallelism
    if parallelism == "none" and processes > 1:
        parallelism = "fsdp" if training.parallelism == "fsdp" else "ddp"
    if parallelism == "fsdp":
        _check_fsdp(training, batch, processes, devices)
    share = batch // processes
    rows = next(n for n in range(min(plan.batch_size, share), 0, -1) if share % n == 0)
    split = {
        "batch_size": rows,
        "gradient_accumulation_steps": share // rows,
        "parallelism": parallelism if processes > 1 else "none",
    }
    return plan.model_copy(update=split), processes


def _check_fsdp(training: Training, batch: int, processes: int, devices: int) -> None:
    if training.method == "qlora" and devices > 1:
        raise StageError(
            Reason.INVALID_CONFIG,
            "training.method qlora can't be spread over several GPUs: set training.parallelism to "
            "ddp (4-bit weights take a quarter of the memory), or training.method to lora.",
        )
    if processes < devices:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"A model spread over {devices} GPUs (training.parallelism fsdp) needs an effective "
            f"batch (batchSize x gradientAccumulationSteps, here {batch}) that {devices} divides: "
            f"set training.gradientAccumulationSteps to a multiple of {devices}.",
        )


TRACKER_PACKAGES = {
    Tracker.TENSORBOARD: ("tensorboardX", "tensorboard"),
    Tracker.MLFLOW: ("mlflow",),
    Tracker.WANDB: ("wandb",),
}


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
