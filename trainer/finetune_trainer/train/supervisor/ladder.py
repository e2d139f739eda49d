"""When memory runs out: what to try, rung by rung, going on from the last complete step.

    1. free the memory: a new worker with the same plan, once for each plan
    2. fewer examples and tokens a pass and more passes a step, down to one example; the effective
       batch stays the same
    3. gradient checkpointing of every second layer if there is none, then of all, unless
       training.gradientCheckpointing is `never`
    4. shorter sequences, only down to training.minSequenceLength, and only as far as
       dataset.maxTruncatedRows allows
    5. the end: OutOfGPUMemory, with what was tried and what is left to do

Rungs 1 to 3 don't change the result. A CPU's training goes down the same ladder when the kernel
kills its worker for want of memory. (Where the kernel kills the whole pod, the operator sees it.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from finetune_trainer.contract import (
    Notice,
    NoticeCode,
    Reason,
    TrainingPlan,
    allowed,
)
from finetune_trainer.memory.remedies import (
    BASE_MODEL_TOO_LARGE,
    GENERAL_REMEDIES,
    remedies_after_ladder,
)
from finetune_trainer.train.link import Failed, Trained, TrainingWork, trained_steps

WORTH_IT = 0.9  # of the longest row; cutting less frees next to nothing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FailedAttempt:
    """A run of the worker that ran out of memory."""

    work: TrainingWork
    failed: Failed


Rung = tuple[TrainingWork, Notice]
"""What to try next, and what people are told about it."""


def descend(
    run: Callable[[TrainingWork], Trained | Failed],
    work: TrainingWork,
    newest_checkpoint: Callable[[], Path | None],
    announce: Callable[[Notice], None],
) -> Trained | Failed:
    """Run the worker, with less and less memory where that is what it lacks.

    `newest_checkpoint` is on disk and complete. `announce` is told of every rung.
    """
    history: list[FailedAttempt] = []
    while True:
        ending = run(work)
        if isinstance(ending, Trained):
            return ending
        if not less_memory_helps(work, ending):
            return _with_message(ending, ending.message, GENERAL_REMEDIES.get(ending.reason))
        resume_from = latest_checkpoint([ending.checkpoint, newest_checkpoint(), work.resume_from])
        on_gpu = ending.reason is Reason.OUT_OF_GPU_MEMORY
        if ending.step is None and on_gpu and not resume_from:
            # It failed before its first step: the model was being loaded.
            return _with_message(ending, ending.message, BASE_MODEL_TOO_LARGE)
        rung = next_rung(work, ending, history, ending.lengths)
        history.append(FailedAttempt(work, ending))
        if rung is None:
            return _end_of_ladder(history)
        work, notice = rung
        work = work.model_copy(update={"resume_from": resume_from})
        announce(notice)
        log.info("The training goes on from step %d", trained_steps(resume_from))


def less_memory_helps(work: TrainingWork, failed: Failed) -> bool:
    """Whether passes that need less memory can cure the failure."""
    hardware = work.config.hardware
    on_cpu = hardware is None or hardware.gpus == 0
    return failed.reason is Reason.OUT_OF_GPU_MEMORY or (
        failed.reason in (Reason.OUT_OF_MEMORY, Reason.OOM_KILLED) and on_cpu
    )


def next_rung(
    work: TrainingWork,
    failed: Failed,
    history: Sequence[FailedAttempt],
    lengths: Mapping[int, int],
) -> Rung | None:
    """What to try next; None at the end of the ladder.

    `history` has the earlier attempts, `lengths` how many examples have how many tokens.
    """
    plan = work.plan
    if _may_free_memory(work, failed, history):
        remedy = "The training goes on in a new process, with the GPU's memory empty."
        return work, _notice(NoticeCode.MEMORY_FREED, failed, remedy)
    if found := smaller_passes(plan, max(lengths, default=0)):
        smaller, change = found
        remedy = (
            f"The training goes on with {change}: the effective batch and the result stay the same."
        )
        return _with_plan(work, smaller), _notice(NoticeCode.BATCH_HALVED, failed, remedy)
    if found := more_recomputation(work):
        recomputing, change = found
        remedy = f"The training goes on with {change}, with the same result."
        notice = _notice(NoticeCode.GRADIENT_CHECKPOINTING_ENABLED, failed, remedy)
        return _with_plan(work, recomputing), notice
    if shorter := shorter_sequence(work, lengths):
        remedy = (
            f"The training goes on with {shorter} tokens instead of {max(lengths)}, as "
            f"spec.training.minSequenceLength allows: {_count_longer(lengths, shorter)} of "
            f"{sum(lengths.values())} examples are cut."
        )
        notice = _notice(NoticeCode.SEQUENCE_SHORTENED, failed, remedy)
        tokens = None if plan.pass_tokens is None else min(plan.pass_tokens, shorter)
        update = {
            "max_sequence_length": shorter,
            "plan": plan.model_copy(update={"pass_tokens": tokens}),
        }
        return work.model_copy(update=update), notice
    return None


def smaller_passes(plan: TrainingPlan, longest: int) -> tuple[TrainingPlan, str] | None:
    """The plan with passes of about half the size, and the change in words.

    None where a pass has one example, or as many tokens as the longest one (0 if not known).
    """
    rows, passes, tokens = plan.batch_size, plan.gradient_accumulation_steps, plan.pass_tokens
    if rows > 1:
        fewer = fewer_examples(rows, passes)
        more = rows * passes // fewer
        update = {
            "batch_size": fewer,
            "gradient_accumulation_steps": more,
            "pass_tokens": tokens and tokens // 2,
        }
        change = f"{fewer} x {more} instead of {rows} x {passes} (examples a pass x passes a step)"
        return plan.model_copy(update=update), change
    if tokens and 0 < longest < tokens:
        half = max(tokens // 2, longest)
        change = f"at most {half} tokens a pass instead of {tokens}"
        return plan.model_copy(update={"pass_tokens": half}), change
    return None


def more_recomputation(work: TrainingWork) -> tuple[TrainingPlan, str] | None:
    """The plan with activations of more layers computed again, and the change in words.

    None where all are already, or where the spec allows none. Unsloth knows all or none.
    """
    plan = work.plan
    if work.config.training.gradient_checkpointing == "never":
        return None
    if not plan.gradient_checkpointing and work.engine != "unsloth":
        update = {"gradient_checkpointing": True, "recompute_every": 2}
        change = "gradient checkpointing of every second layer: about a sixth slower"
        return plan.model_copy(update=update), change
    if not plan.gradient_checkpointing or plan.recompute_every > 1:
        update = {"gradient_checkpointing": True, "recompute_every": 1}
        change = "gradient checkpointing of all layers: about a third slower than without"
        return plan.model_copy(update=update), change
    return None


def fewer_examples(examples: int, passes: int) -> int:
    """About half as many examples a pass, so that whole passes make exactly the same step."""
    batch = examples * passes
    return max(n for n in range(1, (examples + 1) // 2 + 1) if batch % n == 0)


def shorter_sequence(work: TrainingWork, lengths: Mapping[int, int]) -> int | None:
    """Half of the longest row, or as little above as the spec's limits ask for; None if too much.

    Rows that `prepare` has cut already count as cut: they are as long as the present limit.
    """
    minimum, dataset = work.config.training.min_sequence_length, work.config.dataset
    if minimum is None or not lengths:
        return None
    longest, total = max(lengths), sum(lengths.values())
    # One row at least has to keep its end, or the model would never learn to stop.
    limit = min(allowed(dataset.max_truncated_rows, total), total - 1)
    fits = next(n for n in sorted(lengths) if _count_longer(lengths, n) <= limit)
    target = max(minimum, longest // 2, fits)
    return target if target <= WORTH_IT * longest else None


def latest_checkpoint(checkpoints: Iterable[Path | None]) -> Path | None:
    """The checkpoint of the latest step; of equals the first."""
    found = [checkpoint for checkpoint in checkpoints if checkpoint is not None]
    return max(found, key=trained_steps, default=None)


def _end_of_ladder(history: Sequence[FailedAttempt]) -> Failed:
    work, failed = history[-1].work, history[-1].failed
    batch_sizes = _distinct(attempt.work.plan.batch_size for attempt in history)
    tried = [f"{', '.join(map(str, batch_sizes))} examples a pass"]
    if any(_same_plan(before.work, after.work) for before, after in pairwise(history)):
        tried.append("empty memory in a new process")
    if work.plan.gradient_checkpointing:
        tried.append("gradient checkpointing")
    shorter = _distinct(attempt.work.max_sequence_length for attempt in history)[1:]
    tried += [f"{length} tokens an example" for length in shorter]
    remedies = remedies_after_ladder(
        work.config.training,
        work.plan,
        work.max_sequence_length,
        on_gpu=failed.reason is Reason.OUT_OF_GPU_MEMORY,
    )
    ended = _with_message(failed, failed.message, f"Tried: {', '.join(tried)}.", remedies)
    if failed.reason is Reason.OOM_KILLED:
        # The operator would try again after a kill. Now it is a matter of size.
        return ended.model_copy(update={"reason": Reason.OUT_OF_MEMORY})
    return ended


def _may_free_memory(work: TrainingWork, failed: Failed, history: Sequence[FailedAttempt]) -> bool:
    """Whether this plan has worked for a step at least, and had no new process yet."""
    if failed.step is None or failed.step <= trained_steps(work.resume_from):
        return False
    return not any(_same_plan(attempt.work, work) for attempt in history)


def _same_plan(one: TrainingWork, other: TrainingWork) -> bool:
    return (one.plan, one.max_sequence_length) == (other.plan, other.max_sequence_length)


def _with_plan(work: TrainingWork, plan: TrainingPlan) -> TrainingWork:
    return work.model_copy(update={"plan": plan})


def _with_message(failed: Failed, *sentences: str | None) -> Failed:
    return failed.model_copy(update={"message": " ".join(filter(None, sentences))})


def _count_longer(lengths: Mapping[int, int], limit: int) -> int:
    return sum(count for length, count in lengths.items() if length > limit)


def _distinct(values: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(values))


def _notice(code: NoticeCode, failed: Failed, remedy: str) -> Notice:
    return Notice(code=code, step=failed.step, evidence=f"{failed.message:.300}", remedy=remedy)
