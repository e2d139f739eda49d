"""When memory runs out: what to try, rung by rung, going on from the last complete step.

    1. free the memory: a new worker with the same plan, once for each plan
    2. fewer examples a pass and more passes a step, down to 1; the effective batch stays the same
    3. gradient checkpointing, unless training.gradientCheckpointing is `never`
    4. shorter sequences, only down to training.minSequenceLength, and only as far as
       dataset.maxTruncatedRows allows
    5. the end: OutOfGPUMemory, with what was tried and what is left to do

Rungs 1 to 3 don't change the result. A CPU's training goes down the same ladder when its worker is
killed for want of memory (where the kernel kills the whole pod, nobody is left to do so).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from finetune_trainer.contract import Notice, NoticeCode, Reason, StageError, allowed
from finetune_trainer.runtime.failures import GPU_MEMORY_REMEDY, MEMORY_REMEDY
from finetune_trainer.train.link.work import Failed, Trained, Work, read_lengths

WORTH_IT = 0.9  # of the longest row; cutting less frees next to nothing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """A run of the worker that ran out of memory."""

    work: Work
    failed: Failed


def descend(
    run: Callable[[Work], Trained | Failed],
    work: Work,
    newest: Callable[[], Path | None],
    announce: Callable[[Notice], None],
) -> Trained | Failed:
    """Run the worker, with less and less memory where that is what it lacks.

    `newest` is the newest complete checkpoint on disk; `announce` is told of every rung.
    """
    history: list[Attempt] = []
    while True:
        ending = _attempt(run, work)
        if isinstance(ending, Trained) or not concerns(work, ending):
            return ending
        going_on = latest([ending.checkpoint, newest(), work.resume_from])
        if ending.step is None and ending.reason is Reason.OUT_OF_GPU_MEMORY and not going_on:
            return ending.model_copy(update={"message": _too_large(ending)})
        rung = next_rung(work, ending, history, read_lengths(work.room))
        history.append(Attempt(work, ending))
        if rung is None:
            return _exhausted(history)
        work, notice = rung
        work = work.model_copy(update={"resume_from": going_on})
        announce(notice)
        log.info("The training goes on from step %d", step_of(going_on))


def concerns(work: Work, failed: Failed) -> bool:
    """Whether less memory for a pass can help."""
    hardware = work.config.hardware
    on_cpu = hardware is None or hardware.gpus == 0
    return failed.reason is Reason.OUT_OF_GPU_MEMORY or (
        failed.reason in (Reason.OUT_OF_MEMORY, Reason.OOM_KILLED) and on_cpu
    )


def next_rung(
    work: Work, failed: Failed, history: Sequence[Attempt], lengths: Mapping[int, int]
) -> tuple[Work, Notice] | None:
    """What to try next, and the notice of it; None at the end of the ladder.

    `history` has the earlier attempts, `lengths` how many examples have how many tokens.
    """
    plan = work.plan
    if _may_be_freed(work, failed, history):
        done = "The training goes on in a new process, with the GPU's memory empty."
        return work, _notice(NoticeCode.MEMORY_FREED, failed, done)
    if plan.batch_size > 1:
        examples = smaller(plan.batch_size, plan.gradient_accumulation_steps)
        passes = plan.batch_size * plan.gradient_accumulation_steps // examples
        done = (
            f"The training goes on with {examples} x {passes} instead of {plan.batch_size} x "
            f"{plan.gradient_accumulation_steps} (examples a pass x passes a step): the effective "
            "batch and the result stay the same."
        )
        split = {"batch_size": examples, "gradient_accumulation_steps": passes}
        return _with_plan(work, split), _notice(NoticeCode.BATCH_HALVED, failed, done)
    if not plan.gradient_checkpointing and _may_checkpoint(work):
        done = (
            "The training goes on with gradient checkpointing: about a third slower, with the same "
            "result. Set spec.training.gradientCheckpointing to always to begin so."
        )
        notice = _notice(NoticeCode.GRADIENT_CHECKPOINTING_ENABLED, failed, done)
        return _with_plan(work, {"gradient_checkpointing": True}), notice
    if shorter := shortened(work, lengths):
        cut, total = _cut(lengths, shorter), sum(lengths.values())
        done = (
            f"The training goes on with {shorter} tokens instead of {max(lengths)}, as "
            f"spec.training.minSequenceLength allows: {cut} of {total} examples are cut."
        )
        notice = _notice(NoticeCode.SEQUENCE_SHORTENED, failed, done)
        return work.model_copy(update={"max_sequence_length": shorter}), notice
    return None


def smaller(examples: int, passes: int) -> int:
    """About half as many examples a pass, so that whole passes make exactly the same step."""
    batch = examples * passes
    return max(n for n in range(1, (examples + 1) // 2 + 1) if batch % n == 0)


def shortened(work: Work, lengths: Mapping[int, int]) -> int | None:
    """Half of the longest row, or as little above as the spec's limits ask for; None if too much.

    Rows that `prepare` has cut already count as cut: they are as long as the present limit.
    """
    minimum, dataset = work.config.training.min_sequence_length, work.config.dataset
    if minimum is None or not lengths:
        return None
    longest, total = max(lengths), sum(lengths.values())
    # One row at least has to keep its end, or the model would never learn to stop.
    limit = min(allowed(dataset.max_truncated_rows, total), total - 1)
    fits = next(n for n in sorted(lengths) if _cut(lengths, n) <= limit)
    target = max(minimum, longest // 2, fits)
    return target if target <= WORTH_IT * longest else None


def at_the_end(history: Sequence[Attempt]) -> str:
    """What is full, what was tried, and what is left to do."""
    work, failed = history[-1].work, history[-1].failed
    on_gpu = failed.reason is Reason.OUT_OF_GPU_MEMORY
    sizes = _distinct(attempt.work.plan.batch_size for attempt in history)
    tried = [f"{', '.join(map(str, sizes))} examples a pass"]
    if any(_same_plan(before.work, after.work) for before, after in pairwise(history)):
        tried.append("empty memory in a new process")
    if work.plan.gradient_checkpointing:
        tried.append("gradient checkpointing")
    shorter = _distinct(attempt.work.max_sequence_length for attempt in history)[1:]
    tried += [f"{n} tokens an example" for n in shorter]
    open_ways = []
    if not work.plan.gradient_checkpointing:
        open_ways.append("set spec.training.gradientCheckpointing to auto")
    minimum = work.config.training.min_sequence_length
    if minimum is None:
        open_ways.append("allow shorter sequences by spec.training.minSequenceLength")
    elif minimum < work.max_sequence_length:
        open_ways.append("allow more cut examples by spec.dataset.maxTruncatedRows")
    open_ways.append("choose a smaller base model")
    if work.config.training.method == "lora" and on_gpu:
        open_ways.append("set spec.training.method to qlora")
    open_ways.append("use a GPU with more memory" if on_gpu else "raise the pod's memory limit")
    ways = "; or ".join(open_ways)
    return f"{what_is_full(failed)} Tried: {', '.join(tried)}. {ways[0].upper()}{ways[1:]}."


def what_is_full(failed: Failed) -> str:
    """The allocator's figures, from the message of an out-of-memory error."""
    message = failed.message
    for remedy in (GPU_MEMORY_REMEDY, MEMORY_REMEDY):
        message = message.removesuffix(remedy)
    return message.strip()


def latest(checkpoints: Iterable[Path | None]) -> Path | None:
    """The checkpoint of the latest step; of equals the first."""
    found = [checkpoint for checkpoint in checkpoints if checkpoint is not None]
    return max(found, key=step_of, default=None)


def step_of(checkpoint: Path | None) -> int:
    """Optimizer steps that are done in a checkpoint; 0 without one."""
    if checkpoint is None:
        return 0
    state: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_bytes())
    return int(state["global_step"])


def _attempt(run: Callable[[Work], Trained | Failed], work: Work) -> Trained | Failed:
    try:
        return run(work)
    except StageError as error:
        if error.reason is not Reason.OOM_KILLED:
            raise
        return Failed(reason=error.reason, message=error.message)


def _exhausted(history: Sequence[Attempt]) -> Failed:
    """The end of the ladder. A kill is now a matter of size, which no further attempt cures."""
    failed = history[-1].failed
    killed = failed.reason is Reason.OOM_KILLED
    reason = Reason.OUT_OF_MEMORY if killed else failed.reason
    return failed.model_copy(update={"reason": reason, "message": at_the_end(history)})


def _may_be_freed(work: Work, failed: Failed, history: Sequence[Attempt]) -> bool:
    """Whether this plan has worked for a step at least, and was not yet given a new process."""
    if failed.step is None or failed.step <= step_of(work.resume_from):
        return False
    return not any(_same_plan(attempt.work, work) for attempt in history)


def _same_plan(one: Work, other: Work) -> bool:
    return (one.plan, one.max_sequence_length) == (other.plan, other.max_sequence_length)


def _may_checkpoint(work: Work) -> bool:
    return work.config.training.gradient_checkpointing != "never"


def _with_plan(work: Work, update: dict[str, Any]) -> Work:
    return work.model_copy(update={"plan": work.plan.model_copy(update=update)})


def _cut(lengths: Mapping[int, int], limit: int) -> int:
    return sum(count for length, count in lengths.items() if length > limit)


def _distinct(values: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(values))


def _notice(code: NoticeCode, failed: Failed, done: str) -> Notice:
    return Notice(code=code, step=failed.step, evidence=f"{what_is_full(failed):.300}", remedy=done)


def _too_large(failed: Failed) -> str:
    return (
        f"{what_is_full(failed)} The base model alone does not fit: choose a smaller one, set "
        "spec.training.method to qlora, or use a GPU with more memory."
    )
