"""Trainings by the trainer's own `fine_tune`, and what is looked at in them.

A case asks for a training by what it changes of the recipe: fields of spec.training, how a step is
split, and switches of the trainer. `fine_tune` does the rest as it does in a pod; the trainer that
it builds is given callbacks before it begins.
"""

# ruff: noqa: ARG002 - the arguments are transformers'

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from benchmarks.gpu.models import Scale, make_model, row, write_rows
from finetune_trainer.contract import Hardware, RunConfig, TrainingPlan
from finetune_trainer.memory.plan import Lengths, plan
from finetune_trainer.memory.remedies import Attempt
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.loading import compute_dtype
from finetune_trainer.model.shape import Shape
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.train.link import Engine, Trained, TrainingWork
from finetune_trainer.train.recipe import sft
from finetune_trainer.train.recipe.trainer import RecipeTrainer

OnTrainer = Callable[[RecipeTrainer], None]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Bench:
    """Where cases work, and how large everything is."""

    folder: Path
    """For everything; models lie in `models` below it."""

    scale: Scale
    known: dict[Any, Any] = field(default_factory=dict)
    """What several cases compare with, so that it is trained once."""

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returned when it was first asked for by this key."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def model(self, name: str) -> Path:
        """The folder of `1b` or `8b`; made when it is asked for first."""
        folder = self.folder / "models"
        folder.mkdir(exist_ok=True)
        made = make_model(name, self.scale, folder)
        free_memory()  # or what making it took would count for the training after it
        return made

    def shape(self, name: str) -> Shape:
        """Its widths."""
        return cast("Shape", Shape.of_model(self.model(name)))

    @property
    def device(self) -> str:
        """As torch names it."""
        return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Ask:
    """A training, by what is particular to it."""

    model: str = "1b"
    lengths: tuple[int, ...] = ()
    """Tokens of each row."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Of spec.training."""

    split: tuple[int, int] | None = None
    """Rows a pass, passes a step. None: what the planner chooses for this device."""

    checkpointing: bool = False
    """Gradient checkpointing; counts with `split` alone."""

    dropout: float = 0
    """Of the adapter, where one step is compared with another."""

    held_out: int = 0
    """Rows that are evaluated on, before and after."""

    engine: Engine = "transformers"
    same_row: bool = False
    """Whether all rows say the same, so that there is something to learn."""

    def but(self, **changes: Any) -> Ask:
        """The same but for this; `settings` are added to those that are there."""
        settings = self.settings | changes.pop("settings", {})
        return replace(self, settings=settings, **changes)


def make_work(bench: Bench, ask: Ask, name: str) -> TrainingWork:
    """What a worker is told, with its files in a folder of that name."""
    workdir = bench.folder / name
    shutil.rmtree(workdir, ignore_errors=True)
    workdir.mkdir()
    model = bench.model(ask.model)
    rows = [row(n, 0 if ask.same_row else seed) for seed, n in enumerate(ask.lengths)]
    config = RunConfig.model_validate(
        {
            "model": {"source": str(model)},
            "dataset": {"source": "/data/rows.csv"},
            "output": {"uri": str(workdir / "out")},
            "training": {"epochs": 1, "maxSequenceLength": bench.scale.longest, **ask.settings},
            "hardware": {"gpus": 1} if bench.device == "cuda" else None,
        }
    )
    return TrainingWork(
        config=config,
        plan=make_plan(bench, ask, config),
        max_sequence_length=config.training.max_sequence_length,
        engine=ask.engine,
        examples=write_rows(workdir / "examples.jsonl", rows),
        held_out=write_rows(workdir / "eval.jsonl", rows[: ask.held_out]) if ask.held_out else None,
        model=ModelFolder(model),
        workdir=workdir,
    )


def make_plan(bench: Bench, ask: Ask, config: RunConfig) -> TrainingPlan:
    """The split that is asked for, with the memory predicted for it; else the planner's."""
    attempt = attempt_of(bench, ask, config)
    if ask.split:
        rows, passes = ask.split
        return TrainingPlan(
            batch_size=rows,
            gradient_accumulation_steps=passes,
            gradient_checkpointing=ask.checkpointing,
            device_bytes=attempt.needs(rows, ask.checkpointing),
        )
    lengths, hardware = Lengths(attempt.longest), hardware_of(bench)
    return plan(config.training, attempt.shape, lengths, hardware, half=attempt.half)


def attempt_of(bench: Bench, ask: Ask, config: RunConfig) -> Attempt:
    """The training as the predictor sees it."""
    half = compute_dtype() is not torch.float32
    attempt = Attempt(config.training, bench.shape(ask.model), max(ask.lengths), half=half)
    return attempt.on_cpu(half=half) if bench.device == "cpu" else attempt


def hardware_of(bench: Bench) -> Hardware:
    """One GPU, or this machine's memory."""
    if bench.device == "cpu":
        return Hardware(memory_bytes=8 << 30)
    total = torch.cuda.get_device_properties(0).total_memory
    return Hardware(gpus=1, gpu_memory_bytes=total)


@contextmanager
def hooked(on_trainer: Sequence[OnTrainer]) -> Iterator[None]:
    """While the block runs, each trainer that the recipe builds is shown to these."""
    build = sft.build_trainer

    def build_trainer(*arguments: Any, **options: Any) -> RecipeTrainer:
        trainer = build(*arguments, **options)
        for show in on_trainer:
            show(trainer)
        return trainer

    with switched(sft, build_trainer=build_trainer):
        yield


@contextmanager
def switched(module: ModuleType, **values: Any) -> Iterator[None]:
    """While the block runs, these names of a module mean something else."""
    before = {name: vars(module)[name] for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)


def fine_tune(work: TrainingWork, *on_trainer: OnTrainer, interpret: bool = False) -> Trained:
    """Train in this process, and leave the device's memory empty.

    A CPU takes 16 ms a token to interpret the output layer's kernels, so it does so only where
    that is what a case is about (`interpret`).
    """
    shown = on_trainer if interpret or torch.cuda.is_available() else (unfuse, *on_trainer)
    with ExitStack() as stack:
        stack.callback(free_memory)
        stack.enter_context(hooked(shown))
        return sft.fine_tune(work, Reporter())


def unfuse(trainer: RecipeTrainer) -> None:
    """Let PyTorch compute the loss, without Triton."""
    trainer.fused_head = False


def free_memory() -> None:
    """Give back what a training held of the device's memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def missing_for_qlora() -> str | None:
    """Why nothing can be held in 4 bits here."""
    try:
        import bitsandbytes  # noqa: F401, PLC0415 - a machine may lack it
    except ImportError as error:
        return f"bitsandbytes can't be imported: {error}"
    return None


def model_of(trainer: RecipeTrainer) -> Any:
    """The model with its adapter."""
    return trainer.model


def attention_of(trainer: RecipeTrainer) -> str:
    """How it attends, by the name in transformers."""
    return str(model_of(trainer).config._attn_implementation)


def optimizer_of(trainer: RecipeTrainer) -> str:
    """Its name among the Trainer's arguments."""
    return str(getattr(trainer.args.optim, "value", trainer.args.optim))


def read_adapter(work: TrainingWork) -> dict[str, torch.Tensor]:
    """What was trained, as it was saved."""
    return load_file(work.adapter / "adapter_model.safetensors")


def on_step_end(then: Callable[[Any, Any], None]) -> TrainerCallback:
    """A callback that is given the Trainer's state and control after each step."""

    class OnStepEnd(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            then(state, control)

    return OnStepEnd()


@dataclass
class StepClock:
    """Times the steps after the first ones, and ends the training when that was long enough.

    A device works behind the program that feeds it, so a time is taken when it has caught up.
    """

    seconds: float
    """How long to measure at least."""

    warm_up: int = 2
    times: list[float] = field(default_factory=list)
    """When each step was complete."""

    def attach(self, trainer: Any) -> None:
        """Watch any Trainer."""
        trainer.add_callback(on_step_end(self._step))

    def _step(self, _: Any, control: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.monotonic())
        timed = len(self.times) - 1 - self.warm_up
        if timed >= 1 and self.times[-1] - self.times[self.warm_up] >= self.seconds:
            control.should_training_stop = True

    @property
    def counts(self) -> tuple[int, int]:
        """How many steps were complete when timing began, and when it ended."""
        return self.warm_up + 1, len(self.times)

    @property
    def elapsed(self) -> float:
        """Seconds in between. RuntimeError where the training was too short."""
        if len(self.times) < self.warm_up + 2:
            raise RuntimeError(f"{len(self.times)} steps are too few to time")
        return self.times[-1] - self.times[self.warm_up]
