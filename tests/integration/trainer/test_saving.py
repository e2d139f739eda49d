"""What the worker saves: at the end of a step, after a failure within one, and what comes back."""

# ruff: noqa: ARG002 - the arguments of callbacks are transformers'

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.trainer_callback import ExportableState

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.tokenizer import load_tokenizer, message_pair
from finetune_trainer.train.link import InterruptedTrainingError, TrainingWork
from finetune_trainer.train.recipe import saving, sft
from finetune_trainer.train.recipe.trainer import RecipeTrainer, TrainingData
from tests.integration.trainer.recipe import make_work

ROWS = [
    message_pair(f"What is {number}?", "It is green. " * (1 + number % 4)) for number in range(20)
]
SETTINGS: dict[str, Any] = {
    "batchSize": 2,
    "gradientAccumulationSteps": 2,
    "learningRate": 0.005,
    "loggingSteps": 3,
    "lora": {"r": 4, "dropout": 0.2},
}
STEPS = 5
Make = Callable[..., tuple[RecipeTrainer, TrainingWork]]


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Make:
    """Trainers of one epoch of five steps."""
    count = iter(range(10))

    def build_one(
        resume_from: Path | None = None, **settings: Any
    ) -> tuple[RecipeTrainer, TrainingWork]:
        workdir = tmp_path / f"workdir-{next(count)}"
        workdir.mkdir()
        work = make_work(tiny_model, workdir, ROWS, ROWS[:3], **{**SETTINGS, **settings})
        work = work.model_copy(update={"resume_from": resume_from})
        tokenizer = load_tokenizer(ModelFolder(tiny_model))
        examples, held_out = sft.read_rows(work, tokenizer)
        trainer = sft.build_trainer(
            AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
            tokenizer,
            TrainingData(examples, held_out, packed=True),
            work=work,
            epochs=1,
        )
        return trainer, work

    return build_one


def adapter(trainer: RecipeTrainer) -> dict[str, torch.Tensor]:
    assert trainer.model is not None
    return {
        name: parameter.detach().clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }


def finish(trainer: RecipeTrainer, work: TrainingWork) -> tuple[dict[str, torch.Tensor], float]:
    output, _ = saving.train_with_checkpoints(trainer, work, None)
    return adapter(trainer), output.training_loss


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class FailingPass:
    """Lets the pass of that number fail, as a GPU does whose memory is full."""

    def __init__(self, trainer: RecipeTrainer, number: int) -> None:
        self._whole = trainer.compute_loss
        self._left = number
        trainer.compute_loss = self  # type: ignore[method-assign]

    def __call__(self, *args: Any, **options: Any) -> Any:
        self._left -= 1
        loss = self._whole(*args, **options)
        if self._left == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss


def fail(trainer: RecipeTrainer, work: TrainingWork) -> InterruptedTrainingError:
    with pytest.raises(InterruptedTrainingError) as caught:
        saving.train_with_checkpoints(trainer, work, None)
    return caught.value


@pytest.mark.parametrize("failing", [6, 8], ids=["second pass of a step", "a step later"])
def test_the_last_complete_step_outlives_a_pass_that_fails(make: Make, failing: int) -> None:
    expected = finish(*make())
    trainer, work = make()
    # The evaluation before the training has two passes of its own.
    FailingPass(trainer, 2 + failing)
    error = fail(trainer, work)
    assert error.reason is Reason.OUT_OF_GPU_MEMORY
    assert error.step == (failing - 1) // 2
    assert error.checkpoint == work.checkpoints / f"checkpoint-{error.step}"
    assert not (error.checkpoint / "training_args.bin").exists()

    found = finish(*make(error.checkpoint))
    assert equal(found[0], expected[0])
    assert found[1] == expected[1], "the mean loss is that of all steps"


def test_a_checkpoint_of_the_last_step_is_not_written_twice(make: Make) -> None:
    trainer, work = make(checkpointSteps=4)
    FailingPass(trainer, 2 + 5)
    error = fail(trainer, work)
    assert error.step == 2
    assert error.checkpoint == work.checkpoints / "checkpoint-2"


def test_a_failure_in_the_first_step_has_only_what_was_resumed_from(make: Make) -> None:
    trainer, work = make()
    FailingPass(trainer, 2 + 2)
    error = fail(trainer, work)
    assert (error.step, error.checkpoint) == (0, None)

    trainer, work = make(checkpointSteps=4)
    FailingPass(trainer, 2 + 5)
    first = fail(trainer, work).checkpoint
    trainer, work = make(first)
    FailingPass(trainer, 1)
    error = fail(trainer, work)
    assert (error.step, error.checkpoint) == (2, first)


def test_a_failure_of_the_optimizer_itself_leaves_nothing_to_save(make: Make) -> None:
    trainer, work = make()

    class Failing(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.add_callback(Failing())
    error = fail(trainer, work)
    assert (error.step, error.checkpoint) == (2, None)


def test_other_errors_stay_what_they_are(make: Make) -> None:
    trainer, work = make()

    class Failing(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            raise StageError(Reason.TRAINING_DIVERGED, "The loss became nan.")

    trainer.add_callback(Failing())
    with pytest.raises(StageError, match="nan") as caught:
        saving.train_with_checkpoints(trainer, work, None)
    assert not isinstance(caught.value, InterruptedTrainingError)


@pytest.mark.parametrize("stopped_at", [2, STEPS], ids=["in the middle", "in the last step"])
def test_a_stop_ends_after_the_step_with_its_evaluation(make: Make, stopped_at: int) -> None:
    expected = finish(*make())
    trainer, work = make()

    class Stopping(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == stopped_at:
                callbacks = trainer.callback_handler.callbacks
                (keeper,) = (each for each in callbacks if isinstance(each, saving.CheckpointSaver))
                keeper._on_signal()

    trainer.add_callback(Stopping())
    error = fail(trainer, work)
    assert (error.reason, error.step) == (Reason.STOPPED, stopped_at)
    evaluated = [e["step"] for e in trainer.state.log_history if "eval_loss" in e]
    assert evaluated == ([0, STEPS] if stopped_at == STEPS else [0])

    trainer, work = make(error.checkpoint)
    found = finish(trainer, work)
    assert equal(found[0], expected[0])
    assert found[1] == expected[1]
    evaluated = [e["step"] for e in trainer.state.log_history if "eval_loss" in e]
    assert evaluated == [0, STEPS], "no evaluation is missed or repeated"


def test_saving_changes_nothing_and_leaves_no_pickled_arguments(make: Make) -> None:
    expected = finish(*make())
    trainer, work = make(checkpointSteps=1)
    found = finish(trainer, work)
    assert equal(found[0], expected[0])
    folders = sorted(work.checkpoints.glob("checkpoint-*"))
    # The end of the training leaves its result, and so needs no checkpoint.
    assert [folder.name for folder in folders] == [f"checkpoint-{n}" for n in range(1, STEPS)]
    assert not list(work.checkpoints.rglob("training_args.bin"))
    assert load_file(folders[0] / "adapter_model.safetensors")


def test_without_a_number_of_steps_the_clock_decides(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "INTERVAL_SECONDS", 0.0)
    trainer, work = make()
    finish(trainer, work)
    assert len(list(work.checkpoints.glob("checkpoint-*"))) == STEPS - 1
    monkeypatch.setattr(saving, "INTERVAL_SECONDS", 600.0)
    trainer, work = make()
    finish(trainer, work)
    assert not list(work.checkpoints.glob("checkpoint-*"))


def test_nothing_goes_on_from_where_an_evaluation_has_ended_the_training(make: Make) -> None:
    trainer, work = make(checkpointSteps=4, evalSteps=2)

    class EndingEarly(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 2

    trainer.add_callback(EndingEarly())
    finish(trainer, work)
    assert trainer.state.global_step == 2
    assert not list(work.checkpoints.glob("checkpoint-*"))


class Patience(TrainerCallback, ExportableState):
    """Counts, as an early stopping does."""

    def __init__(self) -> None:
        self.count = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.count += 1

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / "mine").touch()

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"count": self.count}}


def test_what_other_callbacks_count_comes_back(make: Make) -> None:
    trainer, work = make()
    trainer.add_callback(Patience())
    FailingPass(trainer, 2 + 8)
    error = fail(trainer, work)
    assert error.step == 3
    assert error.checkpoint is not None
    assert (error.checkpoint / "mine").exists(), "files of other callbacks are part of it"
    trainer, work = make(error.checkpoint)
    patience = Patience()
    trainer.add_callback(patience)
    finish(trainer, work)
    assert patience.count == STEPS
