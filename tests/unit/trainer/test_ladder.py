"""The ladder: which rung comes next, and how the loop goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.contract import (
    Notice,
    NoticeCode,
    Reason,
    RunConfig,
    TrainingMetrics,
    TrainingPlan,
)
from finetune_trainer.memory.remedies import with_remedy
from finetune_trainer.model import ModelFolder
from finetune_trainer.runtime.lifecycle import explain
from finetune_trainer.train.link import (
    Failed,
    Trained,
    TrainingWork,
    trained_steps,
)
from finetune_trainer.train.supervisor.ladder import (
    FailedAttempt,
    descend,
    fewer_examples,
    latest_checkpoint,
    next_rung,
)

TORCH = (
    "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 23.65 GiB of "
    "which 11.06 MiB is free. Including non-PyTorch memory, this process has 23.60 GiB memory in "
    "use. Of the allocated memory 22.90 GiB is allocated by PyTorch, and 194.87 MiB is reserved."
)


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


FULL = explain(OutOfMemoryError(TORCH))
LENGTHS = {100: 95, 400: 3, 1000: 2}


def work(folder: Path = Path("/workdir"), **training: Any) -> TrainingWork:
    hardware = training.pop("hardware", {"gpus": 1})
    dataset = training.pop("dataset", {})
    config = RunConfig.model_validate(
        {
            "model": {"source": "org/name"},
            "dataset": {"source": "/data/train.csv", **dataset},
            "output": {"uri": "/out"},
            "training": {"batchSize": 4, "gradientAccumulationSteps": 2, **training},
            "hardware": hardware,
        }
    )
    return TrainingWork(
        config=config,
        plan=TrainingPlan(
            batch_size=config.training.batch_size,
            gradient_accumulation_steps=config.training.gradient_accumulation_steps,
            gradient_checkpointing=config.training.gradient_checkpointing == "always",
        ),
        max_sequence_length=config.training.max_sequence_length,
        engine="transformers",
        examples=folder / "examples.jsonl",
        held_out=None,
        model=ModelFolder(folder / "model"),
        workdir=folder,
    )


def full(step: int | None = 0, checkpoint: Path | None = None) -> Failed:
    return Failed(reason=FULL.reason, message=FULL.message, step=step, checkpoint=checkpoint)


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def rungs(
    first: TrainingWork, lengths: dict[int, int], step: int | None = 0
) -> list[tuple[TrainingWork, str]]:
    """The whole ladder, where every attempt fails at the same step."""
    current = first
    history: list[FailedAttempt] = []
    found: list[tuple[TrainingWork, str]] = []
    while rung := next_rung(current, full(step), history, lengths):
        history.append(FailedAttempt(current, full(step)))
        current, notice = rung
        # The next worker tokenizes anew.
        limit = current.max_sequence_length
        lengths = {min(length, limit): 0 for length in lengths} | {
            min(length, limit): sum(
                n for k, n in lengths.items() if min(k, limit) == min(length, limit)
            )
            for length in lengths
        }
        found.append((current, notice.code))
    return found


def test_the_whole_ladder_in_its_order() -> None:
    found = rungs(work(minSequenceLength=128), LENGTHS, step=7)
    assert [code for _, code in found] == [
        "MemoryFreed",
        "BatchHalved",
        "MemoryFreed",
        "BatchHalved",
        "MemoryFreed",
        "GradientCheckpointingEnabled",
        "MemoryFreed",
        "GradientCheckpointingEnabled",
        "MemoryFreed",
        "SequenceShortened",
        "MemoryFreed",
        "SequenceShortened",
        "MemoryFreed",
        "SequenceShortened",
        "MemoryFreed",
    ]
    last, _ = found[-1]
    assert last.plan.batch_size == 1
    assert last.plan.gradient_accumulation_steps == 8
    assert last.plan.gradient_checkpointing
    assert last.max_sequence_length == 128


def test_without_a_step_done_nothing_is_tried_twice() -> None:
    assert [code for _, code in rungs(work(), LENGTHS)] == [
        NoticeCode.BATCH_HALVED,
        NoticeCode.BATCH_HALVED,
        NoticeCode.GRADIENT_CHECKPOINTING_ENABLED,
        NoticeCode.GRADIENT_CHECKPOINTING_ENABLED,
    ]


def test_every_second_layer_is_computed_again_before_all_are() -> None:
    shares = [
        (each.plan.gradient_checkpointing, each.plan.recompute_every)
        for each, _ in rungs(work(batchSize=1), LENGTHS)
    ]
    assert shares == [(True, 2), (True, 1)]
    unsloth = work(batchSize=1).model_copy(update={"engine": "unsloth"})
    (only,) = rungs(unsloth, LENGTHS)
    assert only[0].plan.recompute_every == 1, "Unsloth's own is all or nothing"
    planned = work(batchSize=1, gradientCheckpointing="auto")
    few = planned.plan.model_copy(update={"gradient_checkpointing": True, "recompute_every": 5})
    (last,) = rungs(planned.model_copy(update={"plan": few}), LENGTHS)
    assert last[0].plan.recompute_every == 1


def test_a_step_of_an_earlier_attempt_is_no_progress(tmp_path: Path) -> None:
    resumed = work().model_copy(update={"resume_from": checkpoint(tmp_path, 7)})
    rung = next_rung(resumed, full(7), [], {})
    assert rung is not None
    assert rung[1].code == NoticeCode.BATCH_HALVED
    rung = next_rung(resumed, full(8), [], {})
    assert rung is not None
    assert rung[1].code == NoticeCode.MEMORY_FREED


@pytest.mark.parametrize("setting", ["never", "always"])
def test_gradient_checkpointing_is_not_switched_on_where_it_is_on_or_forbidden(
    setting: str,
) -> None:
    found = rungs(work(batchSize=1, gradientCheckpointing=setting), LENGTHS)
    assert found == []


@given(st.integers(2, 1024), st.integers(1, 4096))
def test_the_effective_batch_stays_exactly_the_same(examples: int, passes: int) -> None:
    fewer = fewer_examples(examples, passes)
    assert 1 <= fewer < examples
    assert examples * passes % fewer == 0


@pytest.mark.parametrize(
    ("examples", "passes", "fewer"),
    [(4, 2, 2), (3, 1, 1), (3, 4, 2), (6, 1, 3), (9, 1, 3), (7, 2, 2), (2, 5, 1)],
)
def test_about_half_as_many_examples(examples: int, passes: int, fewer: int) -> None:
    assert fewer_examples(examples, passes) == fewer


def test_a_rung_says_what_ran_out_and_what_is_done() -> None:
    rung = next_rung(work(), full(), [], {})
    assert rung is not None
    assert rung[1] == Notice(
        code=NoticeCode.BATCH_HALVED,
        step=0,
        evidence="The GPU's memory is full (tried to allocate 1.50 GiB where 11.06 MiB of "
        "23.65 GiB are free).",
        remedy="The training goes on with 2 x 4 instead of 4 x 2 (examples a pass x passes a "
        "step): the effective batch and the result stay the same.",
    )


# Shorter sequences.

SMALLEST: dict[str, Any] = {"batchSize": 1, "gradientCheckpointing": "always"}


@pytest.mark.parametrize(
    ("minimum", "max_truncated", "length", "cut"),
    [
        (128, "10%", 500, 2),  # half of the longest row
        (700, "10%", 700, 2),  # not below the minimum
        (128, 1, None, 0),  # two rows are longer than 400, and only one may be cut
        (1000, "10%", None, 0),  # nothing shorter than the longest row is allowed
        (950, "10%", None, 0),  # not worth it
        (None, "10%", None, 0),  # not allowed at all
    ],
)
def test_a_shorter_sequence_keeps_to_the_limits_of_the_spec(
    minimum: int | None, max_truncated: str | int, length: int | None, cut: int
) -> None:
    smallest = work(
        **SMALLEST, minSequenceLength=minimum, dataset={"maxTruncatedRows": max_truncated}
    )
    rung = next_rung(smallest, full(), [], LENGTHS)
    if length is None:
        assert rung is None
        return
    assert rung is not None
    assert rung[0].max_sequence_length == length
    assert f"{cut} of 100 examples are cut" in rung[1].remedy
    assert f"{length} tokens instead of 1000" in rung[1].remedy


def test_one_example_at_least_keeps_its_end() -> None:
    same = work(**SMALLEST, minSequenceLength=16, dataset={"maxTruncatedRows": "100%"})
    assert next_rung(same, full(), [], {200: 10}) is None


# The loop.

TRAINED = Trained(metrics=TrainingMetrics(), hyperparameters={})


class Worker:
    """Ends as it is told, and remembers what it was asked to do."""

    def __init__(self, *endings: Trained | Failed) -> None:
        self.endings = list(endings)
        self.asked: list[TrainingWork] = []

    def __call__(self, request: TrainingWork) -> Trained | Failed:
        self.asked.append(request)
        return self.endings.pop(0)


def test_each_attempt_goes_on_from_the_last_complete_step(tmp_path: Path) -> None:
    at_3, at_5 = checkpoint(tmp_path, 3), checkpoint(tmp_path, 5)
    worker = Worker(full(3, at_3), full(6), full(6), TRAINED)
    newest = [None, at_5, at_5]
    notices: list[Notice] = []
    assert descend(worker, work(tmp_path), lambda: newest.pop(0), notices.append) == TRAINED
    assert [each.resume_from for each in worker.asked] == [None, at_3, at_5, at_5]
    assert [notice.code for notice in notices] == [
        "MemoryFreed",
        "BatchHalved",
        "MemoryFreed",
    ]
    assert [notice.step for notice in notices] == [3, 6, 6]


def test_at_the_end_it_says_what_was_tried_and_what_is_left(tmp_path: Path) -> None:
    worker = Worker(*[full(0)] * 5)
    ending = descend(worker, work(tmp_path), lambda: None, lambda _: None)
    assert isinstance(ending, Failed)
    assert ending.reason is Reason.OUT_OF_GPU_MEMORY
    assert ending.message == (
        "The GPU's memory is full (tried to allocate 1.50 GiB where 11.06 MiB of 23.65 GiB are "
        "free). Tried: 4, 2, 1 examples a pass, gradient checkpointing. Allow shorter sequences by "
        "spec.training.minSequenceLength; or choose a smaller base model; or set "
        "spec.training.method to qlora; or use a GPU with more memory."
    )


def test_a_model_that_does_not_fit_at_all_is_not_tried_again(tmp_path: Path) -> None:
    worker = Worker(full(None))
    ending = descend(worker, work(tmp_path), lambda: None, lambda _: None)
    assert isinstance(ending, Failed)
    assert "The base model alone does not fit" in ending.message
    assert len(worker.asked) == 1


def test_a_worker_killed_for_want_of_memory_gets_smaller_passes_on_a_cpu(tmp_path: Path) -> None:
    killed = Failed(reason=Reason.OOM_KILLED, message="The training process was killed.")
    worker = Worker(killed, TRAINED)
    notices: list[Notice] = []
    on_cpu = work(tmp_path, hardware={"gpus": 0})
    assert descend(worker, on_cpu, lambda: None, notices.append) == TRAINED
    assert worker.asked[1].plan.batch_size == 2
    assert notices[0].code == NoticeCode.BATCH_HALVED


def test_host_memory_beside_a_gpu_is_none_of_the_ladders_business(tmp_path: Path) -> None:
    killed = Failed(reason=Reason.OOM_KILLED, message="The training process was killed.")
    ending = descend(Worker(killed), work(tmp_path), lambda: None, lambda _: None)
    assert isinstance(ending, Failed)
    assert ending.reason is Reason.OOM_KILLED, "which the operator tries again"
    assert ending.message == (
        "The training process was killed. Raise the memory limit of the stage's pod."
    )


def test_the_smallest_passes_killed_on_a_cpu_are_too_large_for_the_pod(tmp_path: Path) -> None:
    killed = Failed(reason=Reason.OOM_KILLED, message="The training process was killed.")
    on_cpu = work(tmp_path, hardware={"gpus": 0})
    ending = descend(Worker(*[killed] * 5), on_cpu, lambda: None, lambda _: None)
    assert isinstance(ending, Failed)
    assert ending.reason is Reason.OUT_OF_MEMORY
    assert "raise the pod's memory limit" in ending.message
    assert not ending.reason.retryable


def test_other_failures_pass_through(tmp_path: Path) -> None:
    failed = Failed(reason=Reason.OUT_OF_DISK, message="The disk is full.")
    assert descend(Worker(failed), work(tmp_path), lambda: None, lambda _: None) == failed
    crashed = Failed(reason=Reason.INTERNAL_ERROR, message="It crashed.")
    assert descend(Worker(crashed), work(tmp_path), lambda: None, lambda _: None) == crashed


def test_the_latest_of_several_checkpoints(tmp_path: Path) -> None:
    at_9, at_10 = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert latest_checkpoint([at_9, None, at_10]) == at_10
    assert latest_checkpoint([None]) is None
    assert (trained_steps(None), trained_steps(at_9)) == (0, 9)


# What counts as memory that ran out.


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError(TORCH),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_full_gpu_is_recognised(error: Exception) -> None:
    assert explain(error).reason is Reason.OUT_OF_GPU_MEMORY


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
)
def test_full_host_memory_is_recognised(error: Exception) -> None:
    assert explain(error).reason is Reason.OUT_OF_MEMORY


def test_figures_are_left_out_where_there_are_none() -> None:
    message = with_remedy(explain(OutOfMemoryError("out of memory"))).message
    assert message.startswith("The GPU's memory is full. In this order")


def test_the_tokens_of_a_pass_are_halved_with_its_examples() -> None:
    """And once more where they are above those of one example; then there is nothing to halve."""
    begun = work()
    tokens = begun.plan.model_copy(update={"pass_tokens": 9000})
    found = rungs(begun.model_copy(update={"plan": tokens}), LENGTHS)
    passes = [(each.plan.batch_size, each.plan.pass_tokens) for each, _ in found]
    assert passes == [(2, 4500), (1, 2250), (1, 1125), (1, 1000), (1, 1000), (1, 1000)]
    codes = [code for _, code in found]
    assert codes == [*["BatchHalved"] * 4, *["GradientCheckpointingEnabled"] * 2]


def test_a_shorter_sequence_makes_passes_of_fewer_tokens() -> None:
    begun = work(minSequenceLength=128, gradientCheckpointing="always")
    update = {"batch_size": 1, "gradient_accumulation_steps": 8, "pass_tokens": 1000}
    found = rungs(begun.model_copy(update={"plan": begun.plan.model_copy(update=update)}), LENGTHS)
    assert all(each.plan.pass_tokens == each.max_sequence_length for each, _ in found)
    assert found
