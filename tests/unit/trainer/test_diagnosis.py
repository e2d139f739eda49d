"""The signs in a training's curves: true where the fault is, silent on ordinary runs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune_trainer.contract import Notice, NoticeCode, Training
from finetune_trainer.train.recipe.diagnosis import diagnose
from finetune_trainer.train.recipe.training_log import (
    BINS,
    LogPoint,
    binned_losses,
    log_points,
    noise_of,
)

SETTINGS = Training(learning_rate=1e-3, epochs=10)
Shape = Callable[[float], float]
"""Loss as a function of the part of the training that is done, 0 to 1."""


def training(
    shape: Shape,
    *,
    steps: int,
    logging_steps: int = 1,
    epochs: float = 1,
    noise: float = 0.0,
    seed: int = 0,
    grad_norm: float = 1.0,
    held_out: Shape | None = None,
) -> list[LogPoint]:
    """What the Trainer would log: means over the logging steps, of which each has its noise."""
    chance = random.Random(seed)  # noqa: S311 - noise
    history, sums = [], []
    if held_out:
        history.append(LogPoint(0, 0.0, eval_loss=held_out(0.0)))
    evaluated = 0
    for step in range(1, steps + 1):
        done = step / steps
        sums.append(max(shape((step - 1) / steps) + chance.gauss(0, noise), 0.001))
        if step == 1 or step % logging_steps == 0:
            mean = sum(sums) / len(sums)
            history.append(
                LogPoint(step, done * epochs, mean, grad_norm, 1e-3 * (1 - (step - 1) / steps))
            )
            sums = []
        if held_out and int(done * epochs + 1e-9) > evaluated:
            evaluated = int(done * epochs + 1e-9)
            history.append(LogPoint(step, done * epochs, eval_loss=held_out(done)))
    return history


def codes(history: Sequence[LogPoint], spec: Training = SETTINGS) -> set[str]:
    """All codes that would have been sent at any time, as the training went on."""
    sent: set[str] = set()
    # As the callback does: not at every line of a long log.
    for end in {*range(0, len(history), 1 + len(history) // 40), len(history)}:
        sent |= {notice.code for notice in diagnose(history[:end], spec)}
    return sent


def only(history: Sequence[LogPoint], code: NoticeCode, spec: Training = SETTINGS) -> Notice:
    """The one notice with this code, and no other."""
    assert codes(history, spec) == {code}
    for end in range(0, len(history) + 1):
        if found := diagnose(history[:end], spec):
            return found[0]
    raise AssertionError


# Ordinary runs.


@pytest.mark.parametrize("history", [[], [LogPoint(1, 0.1, 3.0, 1.0)]], ids=["nothing", "one line"])
def test_there_is_nothing_to_say_of_almost_nothing(history: list[LogPoint]) -> None:
    assert codes(history) == set()


@settings(max_examples=60)
@given(
    start=st.floats(0.8, 5),
    end=st.floats(0.01, 0.4),
    speed=st.floats(1.5, 12),
    steps=st.integers(1, 240),
    logging_steps=st.sampled_from([1, 5, 10]),
    noise=st.floats(0, 0.5),
    seed=st.integers(0, 10_000),
)
def test_no_alarm_while_a_loss_falls_by_whatever_noise(  # noqa: PLR0917 - drawn by name
    start: float,
    end: float,
    speed: float,
    steps: int,
    logging_steps: int,
    noise: float,
    seed: int,
) -> None:
    """Down to a plateau at a low loss, in one epoch or ten."""

    def shape(done: float) -> float:
        return end + (start - end) * math.exp(-speed * done)

    for epochs in (1, 10):
        history = training(
            shape, steps=steps, logging_steps=logging_steps, epochs=epochs, noise=noise, seed=seed
        )
        assert codes(history) == set()


@example(level=0.625, noise=0.375, steps=80, logging_steps=1, seed=83)
@settings(max_examples=40)
@given(
    level=st.floats(0.5, 3),
    noise=st.floats(0, 0.7),
    steps=st.integers(1, 200),
    logging_steps=st.sampled_from([1, 10]),
    seed=st.integers(0, 10_000),
)
def test_no_alarm_in_one_epoch_that_hardly_moves(
    level: float, noise: float, steps: int, logging_steps: int, seed: int
) -> None:
    """As with a strong model and a small learning rate: each row is new, so nothing is repeated."""
    history = training(
        lambda done: level * (1 - 0.1 * done),
        steps=steps,
        logging_steps=logging_steps,
        noise=noise,
        seed=seed,
    )
    assert codes(history) == set()


@settings(max_examples=30)
@given(best=st.floats(0.5, 2), gap=st.floats(0, 0.09), seed=st.integers(0, 10_000))
def test_no_alarm_where_the_held_out_loss_stays_near_its_best(
    best: float, gap: float, seed: int
) -> None:
    """Many epochs: the rows are learnt by heart and the held-out loss no longer falls."""
    history = training(
        lambda done: 3 * math.exp(-5 * done),
        steps=60,
        epochs=10,
        noise=0.05,
        seed=seed,
        held_out=lambda done: best + max(0.4 - done, 0) * 2 + best * gap * max(done - 0.4, 0),
    )
    assert codes(history) == set()


def test_no_alarm_at_an_easy_first_batch() -> None:
    history = [LogPoint(1, 0.01, 0.1, 1.0)]
    history += [LogPoint(10 * i, 0.1 * i, 1.5 - 0.01 * i, 1.0) for i in range(1, 10)]
    assert codes(history) == set()


def test_no_alarm_at_a_spike_that_is_over_at_once() -> None:
    history = training(lambda done: 2 - done, steps=40)
    history[25] = LogPoint(26, history[25].epoch, 9.0, 30.0)
    assert codes(history) == set()


def test_a_gradient_may_vanish_when_all_is_learnt() -> None:
    history = training(lambda _: 0.002, steps=20, grad_norm=1e-9)
    assert codes(history) == set()


# The five signs.


@pytest.mark.parametrize("logging_steps", [1, 10])
def test_a_loss_that_leaps_up_at_the_start_is_rising(logging_steps: int) -> None:
    spec = Training(learning_rate=1.0)
    history = training(
        lambda done: 3.6 if done == 0 else 11 - 2 * done,
        steps=60,
        logging_steps=logging_steps,
        noise=0.5,
    )
    notice = only(history, NoticeCode.LOSS_RISING, spec)
    assert notice.evidence.startswith("loss 4.07")
    assert "at step 1, then" in notice.evidence
    assert "Lower spec.training.learningRate from 1 to 0.0002" in notice.remedy
    assert notice.step is not None
    assert notice.step <= 40


def test_a_loss_that_is_thrown_about_is_rising_and_not_noisy() -> None:
    """SmolLM2-135M with a learning rate of 1."""
    losses = {1: 2.222, 5: 20.513, 10: 41.493, 15: 13.683, 20: 11.065}
    history = [LogPoint(step, step / 7, loss, 2.0, 1.0) for step, loss in losses.items()]
    assert only(history, NoticeCode.LOSS_RISING, Training(learning_rate=1.0)).step == 15


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_loss_that_fell_and_rises_again_is_rising(noise: float) -> None:
    history = training(
        lambda done: 3 - 4 * done if done < 0.5 else 1 + 6 * (done - 0.5),
        steps=300,
        logging_steps=5,
        noise=noise,
    )
    notice = only(history, NoticeCode.LOSS_RISING)
    assert "down to 1." in notice.evidence
    assert "from 0.001 to 0.0001" in notice.remedy


@pytest.mark.parametrize("logging_steps", [1, 10, 30])
def test_a_plateau_at_a_high_loss_over_epochs_is_flat(logging_steps: int) -> None:
    history = training(
        lambda done: 2.2 + 1.5 * math.exp(-40 * done),
        steps=200,
        logging_steps=logging_steps,
        epochs=10,
        noise=0.05,
    )
    notice = only(history, NoticeCode.LOSS_FLAT)
    assert "Look at the data" in notice.remedy
    assert "mean loss 2.2" in notice.evidence


def test_a_loss_that_never_moves_asks_for_a_higher_learning_rate() -> None:
    spec = Training(learning_rate=1e-7)
    history = training(lambda _: 2.5, steps=40, epochs=4)
    notice = only(history, NoticeCode.LOSS_FLAT, spec)
    assert "learningRate from 1e-07 to 1e-06" in notice.remedy


def test_rows_learnt_by_heart_at_the_cost_of_others_are_overfitting() -> None:
    history = training(
        lambda done: 3 * math.exp(-6 * done),
        steps=100,
        logging_steps=10,
        epochs=10,
        noise=0.02,
        held_out=lambda done: 2 + 2 * abs(done - 0.3),
    )
    notice = only(history, NoticeCode.OVERFITTING)
    assert "eval loss rose from 2 at step 30 to 2." in notice.evidence
    assert "spec.training.earlyStopping" in notice.remedy
    assert "spec.training.epochs from 10 to 3" in notice.remedy


def test_a_held_out_loss_that_rises_with_the_training_loss_is_no_overfitting() -> None:
    history = training(
        lambda done: 2 + 8 * done, steps=100, epochs=10, held_out=lambda done: 2 + 8 * done
    )
    assert codes(history) == {NoticeCode.LOSS_RISING}


def test_a_gradient_of_zero_is_dead() -> None:
    history = training(lambda _: 3.0, steps=20, logging_steps=10, grad_norm=0.0)
    notice = only(history, NoticeCode.DEAD_GRADIENT)
    assert notice.step == 10
    assert notice.evidence == "gradient norm 0 at step 1 (loss 3), 0 at step 10 (loss 3)"
    assert "spec.training.lora.targetModules" in notice.remedy


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_becomes_no_number_blames_the_learning_rate(bad: float) -> None:
    history = [*training(lambda _: 3.0, steps=5), LogPoint(6, 0.5, bad, bad)]
    notice = only(history, NoticeCode.LOSS_NOT_FINITE)
    assert notice.step == 6
    assert notice.evidence == f"loss {bad}, gradient norm {bad}"
    assert "spec.training.learningRate" in notice.remedy


def test_a_loss_that_never_was_a_number_blames_the_model() -> None:
    notice = only([LogPoint(1, 0.1, math.nan, math.nan)], NoticeCode.LOSS_NOT_FINITE)
    assert "spec.model.source" in notice.remedy


# The pieces.


def test_the_trainers_log_is_read_without_its_summaries() -> None:
    log = [
        {"eval_loss": 3.5, "eval_runtime": 1.0, "epoch": 0, "step": 0},
        {"loss": 3.0, "grad_norm": 0.5, "learning_rate": 1e-3, "epoch": 0.1, "step": 1},
        {"train_runtime": 12.0, "train_loss": 2.0, "step": 20},
    ]
    assert log_points(log) == [
        LogPoint(0, 0.0, eval_loss=3.5),
        LogPoint(1, 0.1, loss=3.0, grad_norm=0.5, learning_rate=1e-3),
    ]


@pytest.mark.parametrize("count", [0, 1, BINS, BINS + 1, 1000])
def test_a_curve_has_few_bins_and_ends_with_the_newest_line(count: int) -> None:
    bins = binned_losses([LogPoint(step, 0.0, float(step)) for step in range(1, count + 1)])
    assert len(bins) <= BINS + 1
    assert [step for step, _ in bins][-1:] == ([count] if count else [])


def test_the_spread_is_that_of_the_noise_and_not_of_the_trend() -> None:
    chance = random.Random(0)  # noqa: S311 - noise
    values = [0.01 * i + chance.gauss(0, 0.3) for i in range(2000)]
    assert noise_of(values) == pytest.approx(0.3, rel=0.05)


@given(
    st.lists(
        st.builds(
            LogPoint,
            st.integers(1, 1000),
            st.floats(0, 100),
            st.none() | st.floats(allow_nan=True, width=32),
            st.none() | st.floats(allow_nan=True, width=32),
            st.none() | st.floats(0, 1),
            st.none() | st.floats(allow_nan=True, width=32),
        ),
        max_size=20,
    )
)
def test_no_history_however_odd_breaks_the_diagnosis(history: list[LogPoint]) -> None:
    for notice in diagnose(history, SETTINGS):
        assert notice.evidence
        assert notice.remedy
