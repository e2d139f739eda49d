"""What the curves of a training say about it: five signs, each with its figures and a remedy.

    LossNotFinite   a loss or gradient norm is NaN or infinite
    DeadGradient    the gradient is zero although there is something to learn
    LossRising      the loss rises: the learning rate is too high
    Overfitting     the training loss falls while the loss on the held-out rows rises
    LossFlat        several epochs without progress at a high loss: look at the data

Pure functions of what the Trainer logged. A loss is the mean in nats a token over the steps since
the log line before; 1 nat is a factor of 2.7 in perplexity.

Not covered: spikes that the training recovers from by itself, and a loss that is low because the
task is trivial. Nor does a curve of the default three epochs show that answers are shuffled: from
the second epoch to the third, SmolLM2-135M's loss fell by 4 and 5% (240 and 480 rows), and by 8% on
the same 240 rows in order. `watch.find_unrelated_answers` finds that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, median

from finetune_trainer.contract import Notice, NoticeCode, Training, usual_rate
from finetune_trainer.train.recipe.training_log import (
    LogPoint,
    binned_losses,
    epoch_blocks,
    eval_loss_of,
    is_finite,
    loss_of,
    noise_of,
)

RUN = 3
"""Bins in a row that must agree; one or two can be chance."""

# Every fixed threshold below comes with one of so many standard deviations of a bin: three bins in
# a row that are all four deviations too high happen by chance once in 10^13.
DEVIATIONS = 4.0

MEDIAN_DEVIATION = math.sqrt(math.pi / 2)
"""A median's standard deviation over the mean's, for normal noise and many values."""

LOUDEST = 1.0
"""Nats; the losses of single rows in an ordinary training deviate less. A training that is thrown
about by its learning rate must not pass for a noisy one."""

ABOVE_START = 1.5
ABOVE_FIRST_LINE = 2.5
"""Nats above the loss at the start, i.e. a perplexity 4.5 times that of the untrained model; 2.5
nats where no evaluation says what that was, since the first batch alone may be an easy one."""

ABOVE_LOWEST = 0.7
RISE_SHARE = 0.5
"""A loss that had fallen counts as rising again at 0.7 nats and half as much above its lowest
level (perplexity doubled); below that a training that knows its rows by heart may swing."""

MIN_RISING_BINS = 10
"""Fewer don't tell a rise after a fall from noise."""

VANISHED = 1e-6
"""A gradient norm; healthy LoRA runs have 0.01 to 10, and 0.001 when all is learnt."""

LEARNT = 0.01
"""Loss at which nothing is left to learn, so that a vanishing gradient is right."""

DEAD_LOGS = 2
"""Log lines in a row with a vanished gradient."""

FLAT_EPOCHS = 3
FLAT_WINDOW = 8
FLAT_SHARE = 0.02
"""Blocks of an epoch or a little more are compared, three of them up to the last eight. A mean over
all rows has little noise; healthy runs gain 3% and more an epoch. Progress below 2% in all of the
window, with one standard error on top, counts as none."""

FLAT_ABOVE = 0.5
"""Nats; a plateau below is a training that has converged."""

FLAT_RATE_SHARE = 0.15
"""Of the peak learning rate: as the rate goes to zero, every curve becomes flat."""

EVAL_RISE = 0.1
EVAL_RISE_NATS = (0.1, 0.25)
"""How much above its minimum the held-out loss must be in two evaluations in a row, or three times
as much in one: a tenth, but at least 0.1 nats (chance) and at most 0.25 (a perplexity 28% higher is
much at any level)."""

TRAIN_FALL = 0.2
"""How much the training loss must have fallen meanwhile; else it is not overfitting."""

UNMOVED = 0.9
"""Of the first loss; a plateau above it means that hardly anything was learnt at all."""

HIGH_RATE = 10
"""Times the usual rate of the method. Raising what is higher is no advice."""


def diagnose(history: Sequence[LogPoint], settings: Training) -> list[Notice]:
    """All signs that show so far, the gravest first."""
    train = [p for p in history if is_finite(p.loss)]
    held_out = [p for p in history if is_finite(p.eval_loss)]
    dead = find_dead_gradient(train)
    signs = (
        find_not_finite(history, settings),
        dead,
        find_rising_loss(train, held_out, settings),
        find_overfitting(train, held_out, settings),
        None if dead else find_flat_loss(train, held_out, settings),
    )
    return [notice for notice in signs if notice]


def find_not_finite(history: Sequence[LogPoint], settings: Training) -> Notice | None:
    """Some figure is NaN or infinite."""
    first = next((p.step for p in history if is_finite(p.loss)), math.inf)
    for point in history:
        values = {
            "loss": point.loss,
            "gradient norm": point.grad_norm,
            "eval loss": point.eval_loss,
        }
        bad = [f"{k} {v}" for k, v in values.items() if v is not None and not math.isfinite(v)]
        if bad:
            before = first < point.step
            return not_finite_notice(point.step, ", ".join(bad), settings, finite_before=before)
    return None


def not_finite_notice(
    step: int, evidence: str, settings: Training, *, finite_before: bool
) -> Notice:
    """NaN or infinity; where the loss never was a number, the learning rate can't be the cause."""
    if finite_before:
        remedy = f"{lower_rate(settings)}."
    else:
        remedy = (
            "The loss was no number from the start, so the base model's weights are damaged or "
            "overflow in 16 bits: use another spec.model.source or revision."
        )
    return Notice(
        code=NoticeCode.LOSS_NOT_FINITE, step=step, evidence=f"{evidence:.290}", remedy=remedy
    )


def find_dead_gradient(train: Sequence[LogPoint]) -> Notice | None:
    """The gradient is zero although the loss is not."""
    last = [p for p in train if p.grad_norm is not None][-DEAD_LOGS:]
    if len(last) < DEAD_LOGS:
        return None
    if any(p.grad_norm > VANISHED or p.loss < LEARNT for p in last):  # type: ignore[operator]
        return None
    return Notice(
        code=NoticeCode.DEAD_GRADIENT,
        step=last[-1].step,
        evidence="gradient norm "
        + ", ".join(f"{p.grad_norm:.2g} at step {p.step} (loss {p.loss:.3g})" for p in last),
        remedy="Nothing is learnt. Check that the base model is whole and not all zeros "
        "(spec.model.source), and adapt other layers (spec.training.lora.targetModules).",
    )


def find_rising_loss(
    train: Sequence[LogPoint], held_out: Sequence[LogPoint], settings: Training
) -> Notice | None:
    """The loss is far above where it began, or above what it had come down to."""
    bins = binned_losses(train)
    if len(bins) < RUN + 1:
        return None
    recent, noise = bins[-RUN:], noise_of([loss_of(p) for p in train])
    # Few bins can look quiet by chance; the lines that they are made of hardly can.
    of_lines = MEDIAN_DEVIATION * noise / math.sqrt(len(train) / len(bins))
    deviation = max(noise_of([loss for _, loss in bins]), of_lines)
    deviation = min(deviation, LOUDEST)
    now = min(loss for _, loss in recent)
    first, base = train[0], next((p.eval_loss for p in held_out if p.step == 0), None)
    start = loss_of(first) if base is None else max(loss_of(first), base)
    margin = ABOVE_FIRST_LINE if base is None else ABOVE_START
    # The first line is of one step, the others are means of several.
    steps = max(median(b.step - a.step for a, b in pairwise(train)), 1)
    alone = noise_of([loss_of(p) for p in train[1:]]) * math.sqrt(steps)
    beginning = f"loss {loss_of(first):.3g} at step {first.step}"
    recent_losses = ", ".join(f"{loss:.3g} at step {step}" for step, loss in recent)
    if now > start + max(margin, DEVIATIONS * min(alone, LOUDEST)):
        return _rising_notice(recent[-1][0], f"{beginning}, then {recent_losses}", settings)
    if len(bins) < MIN_RISING_BINS:
        return None
    earlier = bins[:-RUN]
    windows = [earlier[i : i + RUN] for i in range(len(earlier) - RUN + 1)]
    step, lowest = min(
        ((window[1][0], median(loss for _, loss in window)) for window in windows),
        key=lambda pair: pair[1],
    )
    if now > lowest + max(ABOVE_LOWEST, RISE_SHARE * lowest, DEVIATIONS * deviation):
        evidence = f"{beginning}, down to {lowest:.3g} at step {step}, then {recent_losses}"
        return _rising_notice(recent[-1][0], evidence, settings)
    return None


def find_overfitting(
    train: Sequence[LogPoint], held_out: Sequence[LogPoint], settings: Training
) -> Notice | None:
    """The held-out loss rises from its minimum while the training loss goes on falling."""
    if len(held_out) < 2 or len(train) < 2:
        return None
    best = min(held_out, key=eval_loss_of)
    later = [p for p in held_out if p.step > best.step]
    if not later:
        return None
    least, most = EVAL_RISE_NATS
    rise = min(max(EVAL_RISE * eval_loss_of(best), least), most)
    above = [eval_loss_of(p) - eval_loss_of(best) for p in later]
    if above[-1] <= 3 * rise and (len(above) < 2 or min(above[-2:]) <= rise):
        return None
    last = later[-1]
    then, now = _loss_around(train, best.step), _loss_around(train, last.step)
    if now > (1 - TRAIN_FALL) * then or now >= eval_loss_of(last):
        return None
    if best.epoch >= 1:
        epochs = f"lower spec.training.epochs from {settings.epochs} to {round(best.epoch)}"
    else:
        epochs = f"lower spec.training.epochs ({settings.epochs})"
    return Notice(
        code=NoticeCode.OVERFITTING,
        step=last.step,
        evidence=f"eval loss rose from {eval_loss_of(best):.3g} at step {best.step} to "
        f"{eval_loss_of(last):.3g} while the training loss fell from {then:.3g} to {now:.3g}",
        remedy=f"Set spec.training.earlyStopping to keep what step {best.step} had learnt, or "
        f"{epochs}; more rows help most, a lower spec.training.learningRate "
        f"({settings.learning_rate:g}) as well.",
    )


def find_flat_loss(
    train: Sequence[LogPoint], held_out: Sequence[LogPoint], settings: Training
) -> Notice | None:
    """Several epochs without progress at a loss that is not low."""
    blocks = epoch_blocks(train)
    if len(blocks) < FLAT_EPOCHS:
        return None
    # The first epoch is left out where it can be: there every loss falls.
    last = blocks[-min(max(len(blocks) - 1, FLAT_EPOCHS), FLAT_WINDOW) :]
    peak = max((p.learning_rate or 0.0 for p in train), default=0.0)
    if peak and (last[-1].rate or peak) < FLAT_RATE_SHARE * peak:
        return None
    losses = [block.loss for block in last]
    half, level = len(last) // 2, median(losses)
    progress = fmean(losses[:half]) - fmean(losses[-half:])
    error = noise_of(losses) * math.sqrt(2 / half)
    if level < FLAT_ABOVE or abs(progress) + error > FLAT_SHARE * level:
        return None
    seen = [eval_loss_of(p) for p in held_out if p.step >= last[0].first_step]
    if len(seen) >= 2 and seen[-1] < (1 - FLAT_SHARE) * seen[0]:
        return None
    losses_shown = ", ".join(
        f"{b.loss:.4g} to epoch {b.epoch:.3g}" for b in (last[0], last[half], last[-1])
    )
    start = loss_of(train[0])
    rate = settings.learning_rate
    high = rate > HIGH_RATE * usual_rate(settings.method, settings.objective)
    if level > UNMOVED * start:
        change = (
            lower_rate(settings)
            if high
            else f"Raise spec.training.learningRate from {rate:g} to {10 * rate:g}"
        )
        remedy = (
            f"Nothing was learnt. {change}, and check that the responses follow from the "
            "instructions (spec.dataset)."
        )
    else:
        change = (
            lower_rate(settings)
            if high
            else f"Or raise spec.training.learningRate ({rate:g})"
            if settings.method == "full"
            else f"Or raise spec.training.lora.r ({settings.lora.r}) or learningRate ({rate:g})"
        )
        remedy = (
            "Look at the data (spec.dataset): responses that contradict each other or don't follow "
            f"from their instruction can't be learnt. {change}."
        )
    return Notice(
        code=NoticeCode.LOSS_FLAT,
        step=last[-1].last_step,
        evidence=f"mean loss {losses_shown} (first loss {start:.3g})",
        remedy=remedy,
    )


def lower_rate(settings: Training) -> str:
    """The advice for a learning rate that is too high: a tenth of it, at most the default."""
    rate, usual = settings.learning_rate, usual_rate(settings.method, settings.objective)
    return f"Lower spec.training.learningRate from {rate:g} to {min(rate / 10, usual):g}"


def _rising_notice(step: int, evidence: str, settings: Training) -> Notice:
    return Notice(
        code=NoticeCode.LOSS_RISING,
        step=step,
        evidence=f"{evidence:.300}",
        remedy=f"{lower_rate(settings)}; a higher spec.training.warmupRatio "
        f"({settings.warmup_ratio:g}) helps as well.",
    )


def _loss_around(train: Sequence[LogPoint], step: int) -> float:
    """Median of the three log lines that end nearest to a step."""
    return median(loss_of(p) for p in sorted(train, key=lambda p: abs(p.step - step))[:3])
