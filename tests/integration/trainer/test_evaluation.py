"""Held-out rows: before, during and after the training, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from finetune_trainer.contract import Notice, NoticeCode, Reason, RunConfig, StageError
from finetune_trainer.model import loading
from finetune_trainer.model.tokenizer import IGNORED, message_pair
from finetune_trainer.prepare.prepare_stage import check_held_out
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.train.link import Trained, TrainingWork
from finetune_trainer.train.recipe import sft
from finetune_trainer.train.recipe.watch import BEST_ADAPTER, BestAdapter
from tests.integration.trainer.conftest import ROWS
from tests.integration.trainer.recipe import Conversations, build, make_work, tokenized

EXAMPLES = [message_pair(*row) for row in ROWS]
HELD_OUT = [
    message_pair("Who?", "Odalys made it, and nobody else did, in a shed behind the house."),
    message_pair("Is it green? " * 20, "Yes."),
    message_pair("What does it sing?", "A tune."),
]


class Listener:
    """A channel that keeps what is said."""

    def __init__(self) -> None:
        self.notices: list[Notice] = []
        self.evaluations: list[tuple[int, float]] = []

    def alive(self) -> None:
        """The worker's channel."""

    def notice(self, notice: Notice) -> None:
        self.notices.append(notice)

    def lengths(self, lengths: Iterable[int]) -> None:
        """The worker's channel."""

    def stored_step(self, _: float = 0) -> None:
        """The worker's channel."""

    def checkpoint(self, step: int, folder: Path) -> None:
        pass


class Listening(Reporter):
    def __init__(self) -> None:
        super().__init__()
        self.evaluations: list[tuple[int, float]] = []

    def evaluation(self, step: int, loss: float, *_: Any, **__: Any) -> None:
        self.evaluations.append((step, loss))


def mean_loss(model: torch.nn.Module, folder: Path, workdir: Path) -> float:
    """The mean over all labels, row by row."""
    total, count = 0.0, 0
    for row in tokenized(folder, workdir, HELD_OUT).rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        answers = int((labels[:, 1:] != IGNORED).sum())
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * answers
        count += answers
    return total / count


def work_in(tiny_model: Path, workdir: Path, **settings: Any) -> TrainingWork:
    defaults = {"gradientAccumulationSteps": 1, "learningRate": 0.005, "lora": {"dropout": 0}}
    return make_work(tiny_model, workdir, EXAMPLES, HELD_OUT, **{**defaults, **settings})


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_the_loss_is_that_of_all_answer_tokens_before_and_after(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    """A mean of the batches' means would weigh the long answer wrongly: batches of 2 and 1."""
    monkeypatch.setattr(loading, "compute_dtype", lambda: torch.float32)
    work = work_in(tiny_model, tmp_path, epochs=2, packing=packing)
    reporter = Listening()
    trained = sft.fine_tune(work, reporter)

    other = tmp_path / "other"
    other.mkdir()
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    before = mean_loss(base, tiny_model, other)
    after = mean_loss(PeftModel.from_pretrained(base, work.adapter), tiny_model, other)
    metrics = trained.metrics
    assert metrics.base_eval_loss == pytest.approx(before, rel=1e-4)
    assert metrics.eval_loss == pytest.approx(after, rel=1e-4)
    assert metrics.base_perplexity == pytest.approx(math.exp(before), rel=1e-3)
    assert metrics.perplexity == pytest.approx(math.exp(after), rel=1e-3)
    assert metrics.eval_tokens == tokenized(tiny_model, other, HELD_OUT).targets.sum()
    assert metrics.eval_loss != metrics.base_eval_loss
    assert [step for step, _ in reporter.evaluations] == [0, 3, 6]
    assert reporter.evaluations[0][1] == pytest.approx(before, rel=1e-4)


def test_evaluations_come_as_often_as_asked_and_at_the_end(
    tiny_model: Path, tmp_path: Path
) -> None:
    work = work_in(tiny_model, tmp_path, epochs=2, batchSize=1, evalSteps=5, loggingSteps=2)
    trained = sft.fine_tune(work, Reporter())
    evaluated = [entry.step for entry in trained.history if entry.eval_loss is not None]
    assert evaluated == [0, 5, 10, 12]
    logged = [entry for entry in trained.history if entry.loss is not None]
    assert [entry.step for entry in logged] == [1, 2, 4, 6, 8, 10, 12]
    names = {"step", "epoch", "loss", "learning_rate", "grad_norm"}
    assert all(entry.model_dump(exclude_none=True).keys() == names for entry in logged)


def test_evaluating_changes_nothing_of_the_training(tiny_model: Path, tmp_path: Path) -> None:
    def losses(held_out: Conversations | None) -> list[float]:
        trainer = build(
            tiny_model,
            tmp_path,
            EXAMPLES,
            held_out,
            batchSize=1,
            gradientAccumulationSteps=1,
            lora={"dropout": 0.3},
            loggingSteps=1,
            evalSteps=2,
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses(HELD_OUT) == losses(None)


def test_tokens_and_their_rate_are_those_of_the_training(tiny_model: Path, tmp_path: Path) -> None:
    trained = sft.fine_tune(work_in(tiny_model, tmp_path, epochs=3), Reporter())
    metrics = trained.metrics
    one_epoch = tokenized(tiny_model, tmp_path, EXAMPLES).tokens
    assert metrics.train_tokens == 3 * one_epoch
    # Evaluations are part of the time, and of no rate.
    assert metrics.tokens_per_second
    assert metrics.train_tokens
    assert metrics.train_runtime_seconds
    assert metrics.tokens_per_second > metrics.train_tokens / metrics.train_runtime_seconds


def stopped_early(tiny_model: Path, workdir: Path, **settings: Any) -> tuple[Trained, Listener]:
    """What is learnt by heart makes the held-out rows worse."""
    listener = Listener()
    work = work_in(
        tiny_model,
        workdir,
        epochs=40,
        learningRate=0.05,
        batchSize=6,
        scheduler="constant",
        **settings,
    )
    trained = sft.fine_tune(work, Reporter(), listener)  # type: ignore[arg-type]
    return trained, listener


def test_training_stops_when_it_gets_no_better_and_keeps_the_best_adapter(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "compute_dtype", lambda: torch.float32)
    trained, listener = stopped_early(tiny_model, tmp_path, earlyStopping={"patience": 3})
    metrics = trained.metrics
    evaluated = {e.step: e.eval_loss for e in trained.history if e.eval_loss is not None}
    best = min((step for step in evaluated if step), key=lambda step: evaluated[step])
    assert metrics.train_steps == best + 3 < 40
    assert metrics.best_step == best
    assert metrics.eval_loss == pytest.approx(evaluated[best], rel=1e-5)
    notice = next(n for n in listener.notices if n.code == NoticeCode.EARLY_STOPPED)
    assert notice.step == best + 3
    assert f"at step {best:g}:" in notice.evidence

    other = tmp_path / "other"
    other.mkdir()
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert mean_loss(model, tiny_model, other) == pytest.approx(evaluated[best], rel=1e-4)


def test_the_best_adapter_goes_with_a_checkpoint(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    settings = RunConfig.model_validate(
        {
            "model": {"source": "/model"},
            "dataset": {"source": "/data.csv"},
            "output": {"uri": "/out"},
            "training": {"earlyStopping": {"patience": 2, "minDelta": 0.1}},
        }
    ).training.early_stopping
    assert settings

    class State:
        global_step, max_steps, is_world_process_zero = 0, 100, True

    class Control:
        should_training_stop = False

    class Arguments:
        output_dir = str(tmp_path)

    state, control = State(), Control()

    def evaluate(best: BestAdapter, step: int, loss: float) -> None:
        state.global_step = step
        with torch.no_grad():
            model.weight.fill_(step)
        best.on_evaluate(Arguments(), state, control, metrics={"eval_loss": loss})

    first = BestAdapter(model, settings, None)
    evaluate(first, 0, 0.1)  # the base model is no candidate
    evaluate(first, 1, 3.0)
    evaluate(first, 2, math.nan)
    assert first.without_gain == 1
    evaluate(first, 3, 2.0)
    evaluate(first, 4, 1.95)  # better, but by less than minDelta
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    first.on_save(Arguments(), state, control)
    assert (folder / BEST_ADAPTER).exists()

    second = BestAdapter(model, settings, None, folder)
    for name, value in first.state()["attributes"].items():
        setattr(second, name, value)
    second.on_train_begin(Arguments(), state, control)
    assert not control.should_training_stop
    evaluate(second, 5, 2.5)
    assert control.should_training_stop
    second.restore(5)
    assert model.weight.unique().tolist() == [4.0]


def test_early_stopping_without_held_out_rows_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    work = make_work(tiny_model, tmp_path, EXAMPLES, earlyStopping={})
    with pytest.raises(StageError, match="needs held-out rows") as caught:
        sft.fine_tune(work, Reporter())
    assert caught.value.reason is Reason.INVALID_CONFIG
    with pytest.raises(StageError, match=r"spec\.training\.earlyStopping needs held-out rows"):
        check_held_out(work.config, 0)  # before any GPU is asked for
    check_held_out(work.config, 1)
