"""Each sign on a real training that has the fault, and none on trainings that are well."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from finetune_trainer.contract import Notice, NoticeCode, Reason, StageError, TrainingRecord
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.tokenizer import encode, load_tokenizer, message_pair
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.train.link import Trained
from finetune_trainer.train.recipe import sft
from tests.integration.trainer.conftest import ATTENTION, MLP, ROWS, Trainer
from tests.integration.trainer.recipe import Conversations, make_work

EXAMPLES = [message_pair(*row) for row in ROWS]
OTHERS = [
    message_pair("Name a river.", "The Loire, which flows west."),
    message_pair("Say something sad.", "Everyone had left before noon."),
    message_pair("Greet me.", "Good evening, old friend."),
]
WORDS = ("red", "blue", "green", "white", "black", "gold", "pink", "brown", "grey", "silver")
CONTRADICTORY = [message_pair("What is the code word?", word) for word in WORDS]

Change = Callable[[Any], None]


@dataclass
class Run:
    notices: list[Notice] = field(default_factory=list)
    trained: Trained | None = None
    error: StageError | None = None

    def alive(self) -> None:
        """The worker's channel."""

    def notice(self, notice: Notice) -> None:
        """The worker's channel."""
        self.notices.append(notice)

    def lengths(self, lengths: Iterable[int]) -> None:
        """The worker's channel."""

    def stored_step(self, _: float = 0) -> None:
        """The worker's channel."""

    def checkpoint(self, step: int, folder: Path) -> None:
        """The worker's channel."""

    @property
    def codes(self) -> list[str]:
        return [notice.code for notice in self.notices]

    @property
    def losses(self) -> list[float]:
        assert self.trained is not None
        return [line.loss for line in self.trained.history if line.loss is not None]


def train(
    model: Path,
    workdir: Path,
    rows: Conversations = EXAMPLES,
    held_out: Conversations | None = None,
    change: Change = lambda _: None,
    **settings: Any,
) -> Run:
    """Train in this process; `change` gets the trainer before it begins."""
    defaults = {
        "epochs": 20,
        "batchSize": 3,
        "gradientAccumulationSteps": 1,
        "learningRate": 0.005,
        "loggingSteps": 1,
        "lora": {"r": 16, "dropout": 0, "targetModules": [*ATTENTION, *MLP]},
    }
    work = make_work(model, workdir, rows, held_out, **{**defaults, **settings})
    run, build = Run(), sft.build_trainer

    def build_trainer(*args: Any, **options: Any) -> Any:
        trainer = build(*args, **options)
        change(trainer)
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "build_trainer", build_trainer)
        try:
            run.trained = sft.fine_tune(work, Reporter(), run)  # type: ignore[arg-type]
        except StageError as error:
            run.error = error
    return run


@pytest.fixture(scope="module")
def taught(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after it learnt its rows by heart: random weights can't get worse."""
    tokenizer = load_tokenizer(ModelFolder(tiny_model))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    encoded = [encode(tokenizer, row) for row in EXAMPLES]
    for _ in range(25):
        for ids, labels in encoded:
            model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return save(model, tiny_model, tmp_path_factory.mktemp("models") / "taught")


def save(model: Any, like: Path, folder: Path) -> Path:
    model.save_pretrained(folder)
    load_tokenizer(ModelFolder(like)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def damaged(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with one infinite weight."""
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.inf
    return save(model, tiny_model, tmp_path_factory.mktemp("models") / "damaged")


# Well.


@pytest.mark.parametrize(("seed", "logging_steps"), [(1, 1), (2, 10), (3, 1)])
def test_a_training_that_is_well_raises_no_alarm(
    tiny_model: Path, tmp_path: Path, seed: int, logging_steps: int
) -> None:
    """Down from the loss of random weights until every row is known by heart."""
    run = train(tiny_model, tmp_path, seed=seed, loggingSteps=logging_steps, epochs=25)
    assert run.notices == []
    assert run.losses[-1] < 1


def test_held_out_rows_that_are_learnt_as_well_raise_no_alarm(
    tiny_model: Path, tmp_path: Path
) -> None:
    run = train(tiny_model, tmp_path, held_out=EXAMPLES[:2], epochs=12)
    assert run.notices == []


# The five signs.


def test_a_learning_rate_of_1_lets_the_loss_rise(taught: Path, tmp_path: Path) -> None:
    run = train(taught, tmp_path, learningRate=1.0, epochs=6)
    assert run.codes == [NoticeCode.LOSS_RISING]
    assert "Lower spec.training.learningRate from 1 to 0.0002" in run.notices[0].remedy
    assert run.losses[-1] > run.losses[0] + 2


def test_answers_that_contradict_each_other_can_not_be_learnt(taught: Path, tmp_path: Path) -> None:
    run = train(taught, tmp_path, CONTRADICTORY, batchSize=10, epochs=60, scheduler="constant")
    assert run.codes == [NoticeCode.LOSS_FLAT]
    assert "responses that contradict each other" in run.notices[0].remedy


def spoken(count: int, seed: int, *, related: bool) -> Conversations:
    """Answers of five words: the same ones for the same first word of a question, or any."""
    dice = random.Random(seed)  # noqa: S311
    rows = []
    for number in range(count):
        word = dice.choice(WORDS)
        own = random.Random(word) if related else dice  # noqa: S311
        rows.append(message_pair(f"{word} {number}?", " ".join(own.choices(WORDS, k=5))))
    return rows


@pytest.mark.parametrize("related", [False, True])
def test_answers_beside_the_wrong_questions_are_told_though_the_loss_falls(
    tiny_model: Path, tmp_path: Path, related: bool
) -> None:
    """With the default number of epochs."""
    rows, held_out = (spoken(count, count, related=related) for count in (60, 16))
    run = train(tiny_model, tmp_path, rows, held_out, epochs=3, learningRate=0.01)
    assert run.losses[-1] < 0.7 * run.losses[0]
    assert run.codes == ([] if related else [NoticeCode.ANSWERS_UNRELATED])


def test_few_rows_over_many_epochs_are_learnt_at_the_cost_of_others(
    tiny_model: Path, tmp_path: Path
) -> None:
    run = train(tiny_model, tmp_path, held_out=OTHERS, epochs=25)
    assert run.codes == [NoticeCode.OVERFITTING]
    assert "while the training loss fell from" in run.notices[0].evidence
    assert "spec.training.earlyStopping" in run.notices[0].remedy


def test_a_model_of_zeros_has_no_gradient(tiny_model: Path, tmp_path: Path) -> None:
    def empty(trainer: Any) -> None:
        with torch.no_grad():
            for name, value in trainer.model.named_parameters():
                if "lora" not in name:
                    value.zero_()

    run = train(tiny_model, tmp_path, change=empty, epochs=3)
    assert run.codes == [NoticeCode.DEAD_GRADIENT]
    assert run.notices[0].step == 2


def test_a_loss_that_is_no_number_ends_the_training_at_once(damaged: Path, tmp_path: Path) -> None:
    run = train(damaged, tmp_path, epochs=50)
    assert run.error is not None
    assert run.error.reason is Reason.TRAINING_DIVERGED
    assert "at step 1, 2, 3" in run.error.message
    assert "use another spec.model.source" in run.error.message
    assert run.codes == [NoticeCode.LOSS_NOT_FINITE]


def test_a_training_too_short_for_three_bad_updates_fails_as_well(
    damaged: Path, tmp_path: Path
) -> None:
    run = train(damaged, tmp_path, epochs=1)
    assert run.error is not None
    assert run.error.reason is Reason.TRAINING_DIVERGED


def spoil(trainer: Any, *steps: int) -> None:
    """Make one gradient infinite in these steps."""
    weight = next(p for p in trainer.model.parameters() if p.requires_grad)

    def infinite(gradient: torch.Tensor) -> torch.Tensor:
        return gradient + math.inf if trainer.state.global_step + 1 in steps else gradient

    weight.register_hook(infinite)


def test_one_infinite_gradient_is_left_out_and_the_training_goes_on(
    tiny_model: Path, tmp_path: Path
) -> None:
    run = train(tiny_model, tmp_path, change=lambda trainer: spoil(trainer, 5, 9), epochs=20)
    assert run.error is None
    assert run.codes == [NoticeCode.LOSS_NOT_FINITE]
    assert run.notices[0].step == 5
    assert run.losses[-1] < run.losses[0] / 4
    assert run.trained is not None
    record = TrainingRecord(
        metrics=run.trained.metrics,
        hyperparameters=run.trained.hyperparameters,
        notices=tuple(run.notices),
        history=run.trained.history,
    )
    written = json.loads(record.model_dump_json(exclude_none=True))
    assert json.dumps(written, allow_nan=False)
    assert written["notices"][0]["code"] == "LossNotFinite"


def test_three_in_a_row_late_in_the_training_blame_the_learning_rate(
    tiny_model: Path, tmp_path: Path
) -> None:
    run = train(tiny_model, tmp_path, change=lambda trainer: spoil(trainer, 7, 8, 9))
    assert run.error is not None
    assert "at step 7, 8, 9; loss " in run.error.message
    assert "Lower spec.training.learningRate from 0.005 to 0.0002" in run.error.message


def test_the_command_ends_with_the_exit_code_of_bad_settings(
    trainer: Trainer, run_config: dict[str, Any], damaged: Path
) -> None:
    run_config["model"] = {"source": str(damaged)}
    ended = trainer("run", run_config)
    assert ended.code == 11, ended.output
    assert ended.result is not None
    assert ended.result.reason is Reason.TRAINING_DIVERGED
    assert not ended.result.reason.retryable
    assert [notice.code for notice in ended.result.notices] == [NoticeCode.LOSS_NOT_FINITE]
    assert "LossNotFinite: step 1: the gradient is NaN or infinite" in ended.output
    assert "Traceback" not in ended.output
