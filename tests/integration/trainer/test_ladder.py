"""Memory runs out inside the real recipe: the training goes on, and its result is the same."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_trainer.contract import Notice, NoticeCode, Reason, StageResult
from finetune_trainer.model import loading
from finetune_trainer.model.tokenizer import message_pair
from finetune_trainer.runtime.lifecycle import explain
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.train.link import Failed, Trained, TrainingWork, as_failed, trained_steps
from finetune_trainer.train.recipe import sft
from finetune_trainer.train.supervisor import training_session
from finetune_trainer.train.supervisor.ladder import descend
from tests.integration.trainer.conftest import ATTENTION, ROWS, Trainer
from tests.integration.trainer.full_memory import VARIABLE, Fault, FullMemory, FullMemoryWorker
from tests.integration.trainer.recipe import Conversations, make_work

EXAMPLES = [message_pair(*row) for row in ROWS] + [
    message_pair("What is the kettle's name?", "The kettle is called Fennwick, after the hill."),
    message_pair("Who sells it?", "Tovald and Brask sell it."),
]
SETTINGS: dict[str, Any] = {
    "epochs": 2,
    "batchSize": 4,
    "gradientAccumulationSteps": 1,
    "learningRate": 0.005,
    "scheduler": "constant",
    "warmupRatio": 0,
    "loggingSteps": 1,
    "lora": {"r": 4, "dropout": 0, "targetModules": list(ATTENTION)},
}
STEPS = 4


@pytest.fixture(autouse=True, scope="module")
def _in_float32() -> Iterator[None]:
    """In bfloat16 another split of a step shows in the second digit already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "compute_dtype", lambda: torch.float32)
        yield


@dataclass
class Outcome:
    ending: Trained | Failed
    full: FullMemory
    workdir: Path
    notices: list[Notice] = field(default_factory=list)
    asked: list[TrainingWork] = field(default_factory=list)

    @property
    def codes(self) -> list[str]:
        return [notice.code for notice in self.notices]

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        return load_file(self.workdir / "adapter" / "adapter_model.safetensors")

    @property
    def losses(self) -> dict[float, float]:
        assert isinstance(self.ending, Trained)
        return {line.step: line.loss for line in self.ending.history if line.loss is not None}


class Heard:
    """The stage's end of the channel."""

    def __init__(self) -> None:
        self.newest: Path | None = None
        self.counts: dict[int, int] = {}

    def lengths(self, lengths: Iterable[int]) -> None:
        self.counts = Counter(map(int, lengths))

    def stored_step(self, _: float = 0) -> None:
        """The worker's channel."""

    def alive(self) -> None:
        """The worker's channel."""

    def notice(self, notice: Notice) -> None:
        raise AssertionError(notice.text)

    def checkpoint(self, _: int, folder: Path) -> None:
        self.newest = folder


def training(
    model: Path,
    workdir: Path,
    fault: Fault | None,
    rows: Conversations = EXAMPLES,
    **settings: Any,
) -> Outcome:
    """A whole training; each worker is a call of the recipe in this process."""
    workdir.mkdir(exist_ok=True)
    full = FullMemory(fault)
    heard = Heard()
    outcome = Outcome(Failed(reason=Reason.INTERNAL_ERROR, message=""), full, workdir)

    def run(work: TrainingWork) -> Trained | Failed:
        outcome.asked.append(work)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sft, "build_trainer", full.wrap(sft.build_trainer))
            try:
                return sft.fine_tune(work, Reporter(), heard)  # type: ignore[arg-type]
            except Exception as error:
                failed = as_failed(explain(error))
                return failed.model_copy(update={"lengths": heard.counts})

    truncated = settings.pop("maxTruncatedRows", "10%")
    work = make_work(model, workdir, rows, **{**SETTINGS, **settings})
    dataset = work.config.dataset.model_copy(update={"max_truncated_rows": truncated})
    config = work.config.model_copy(update={"dataset": dataset})
    work = work.model_copy(update={"config": config})
    outcome.ending = descend(run, work, lambda: heard.newest, outcome.notices.append)
    return outcome


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    outcome = training(tiny_model, tmp_path_factory.mktemp("undisturbed"), None)
    assert outcome.full.steps == [1, 2, 3, 4]
    assert outcome.notices == []
    return outcome


def assert_same(outcome: Outcome, undisturbed: Outcome, atol: float = 1e-4) -> None:
    """The same rows in each step, and the same result but for the order of sums."""
    assert isinstance(outcome.ending, Trained), outcome.ending
    assert list(outcome.losses) == list(range(1, STEPS + 1))
    for step, rows in undisturbed.full.rows.items():
        assert sorted(outcome.full.rows[step]) == sorted(rows), step
    assert outcome.losses == pytest.approx(undisturbed.losses, rel=1e-3)
    weights = undisturbed.adapter
    assert max(value.abs().max() for name, value in weights.items() if "lora_B" in name) > 1e-2
    for name, value in outcome.adapter.items():
        torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=atol)


def test_smaller_passes_from_the_start(
    tiny_model: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    """No pass with more than one example fits."""
    outcome = training(tiny_model, tmp_path, Fault(tokens=60))
    assert outcome.codes == ["BatchHalved", "BatchHalved"]
    assert [
        (work.plan.batch_size, work.plan.gradient_accumulation_steps) for work in outcome.asked
    ] == [
        (4, 1),
        (2, 2),
        (1, 4),
    ]
    assert_same(outcome, undisturbed)


def test_a_step_that_fails_once_is_done_again_with_empty_memory(
    tiny_model: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    """In the middle of an accumulation; nothing else changes, so the result is the very same."""
    fault = Fault(where="forward", step=3, at_pass=2, times=1)
    split: dict[str, Any] = {"batchSize": 2, "gradientAccumulationSteps": 2}
    outcome = training(tiny_model, tmp_path, fault, **split)
    assert outcome.codes == ["MemoryFreed"]
    assert outcome.notices[0].step == 2
    assert trained_steps(outcome.asked[1].resume_from) == 2
    assert outcome.full.steps == [1, 2, 3, 3, 4]
    assert_same(outcome, undisturbed)


def test_a_backward_pass_that_fails_again_gets_a_smaller_batch(
    tiny_model: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    outcome = training(tiny_model, tmp_path, Fault(where="backward", step=3, times=2))
    assert outcome.codes == ["MemoryFreed", "BatchHalved"]
    assert [trained_steps(work.resume_from) for work in outcome.asked] == [0, 2, 2]
    assert outcome.full.steps == [1, 2, 3, 3, 3, 4]
    assert_same(outcome, undisturbed)
    assert "effective batch and the result stay the same" in outcome.notices[1].remedy
    assert outcome.notices[1].evidence == (
        "The GPU's memory is full (tried to allocate 1.50 GiB where 11.06 MiB of 23.65 GiB are "
        "free)."
    )


def test_an_optimizer_that_fails_in_the_first_step_begins_anew(
    tiny_model: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    """Its state is allocated then."""
    outcome = training(tiny_model, tmp_path, Fault(where="optimizer", step=1, times=1))
    assert outcome.codes == ["BatchHalved"]
    assert outcome.asked[1].resume_from is None
    assert_same(outcome, undisturbed)


def test_an_optimizer_that_fails_later_leaves_nothing_to_go_on_from(
    tiny_model: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    """Half of its weights are of the next step, so the newest checkpoint has to do."""
    fault = Fault(where="optimizer", step=4, times=1)
    outcome = training(tiny_model, tmp_path, fault, checkpointSteps=4)
    assert outcome.codes == ["MemoryFreed"]
    assert [trained_steps(work.resume_from) for work in outcome.asked] == [0, 2]
    assert outcome.full.steps == [1, 2, 3, 4, 3, 4]
    assert_same(outcome, undisturbed)


def test_gradient_checkpointing_where_one_example_is_too_much(
    tiny_model: Path, tmp_path: Path, undisturbed: Outcome
) -> None:
    outcome = training(tiny_model, tmp_path, Fault(with_checkpointing=False))
    assert outcome.codes == ["BatchHalved", "BatchHalved", "GradientCheckpointingEnabled"]
    assert outcome.asked[-1].plan.gradient_checkpointing
    assert outcome.asked[-1].plan.recompute_every == 2
    assert_same(outcome, undisturbed)


def test_a_shorter_sequence_where_the_spec_allows_it(tiny_model: Path, tmp_path: Path) -> None:
    """It changes what is learnt, so it comes last and says how much is cut."""
    rows = [*EXAMPLES[:-1], message_pair("Go on.", "on and " * 60)]
    settings = {"batchSize": 1, "gradientAccumulationSteps": 4, "gradientCheckpointing": "always"}
    limits = {"minSequenceLength": 32, "maxTruncatedRows": 1}
    outcome = training(tiny_model, tmp_path, Fault(tokens=80), rows=rows, **settings, **limits)
    assert isinstance(outcome.ending, Trained), outcome.ending
    assert outcome.codes == ["SequenceShortened"]
    assert "1 of 8 examples are cut" in outcome.notices[0].remedy
    length = outcome.asked[-1].max_sequence_length
    assert 32 < length <= 80
    assert max(len(row) for rows in outcome.full.rows.values() for row in rows) == length
    assert outcome.full.steps[-4:] == [1, 2, 3, 4]


def test_a_worker_that_the_kernel_kills_gets_a_smaller_batch(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, and where the kernel spares the stage."""
    monkeypatch.setattr(training_session, "VMSTAT", tmp_path / "none")  # which counts what it kills
    monkeypatch.setenv(VARIABLE, Fault(step=2, times=1, killed=True).model_dump_json())
    work = make_work(tiny_model, tmp_path, EXAMPLES, **{**SETTINGS, "epochs": 1})
    notices: list[Notice] = []
    ending = descend(FullMemoryWorker().run, work, lambda: None, notices.append)
    assert isinstance(ending, Trained), ending
    assert [notice.code for notice in notices] == [NoticeCode.BATCH_HALVED]
    assert "was killed" in notices[0].evidence


def test_the_end_of_the_ladder_is_the_end_of_the_job(
    trainer: Trainer, run_config: dict[str, Any]
) -> None:
    """The real stage and its workers' processes: exit code, message, status."""
    run_config["training"] |= {"batchSize": 2, "gradientCheckpointing": "always"}
    assert trainer("prepare", run_config).code == 0
    prepared = StageResult.from_message(trainer.log.read_text())
    assert prepared is not None
    assert prepared.resolved is not None
    run_config["resolved"] = prepared.resolved.model_dump(mode="json")
    command = trainer.command("train", run_config)
    command[2] = "tests.integration.trainer.full_memory"
    trainer.log.unlink()
    fault = Fault(step=3).model_dump_json()
    with trainer.processes.popen(
        command,
        env={**trainer.full_environment, VARIABLE: fault},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 12, output + errors
    result = StageResult.from_message(trainer.log.read_text())
    assert result is not None
    assert result.reason is Reason.OUT_OF_GPU_MEMORY
    assert "Tried: 2, 1 examples a pass, empty memory in a new process, gradient" in result.message
    assert "choose a smaller base model; or set spec.training.method to qlora" in result.message
    assert [notice.code for notice in result.notices] == [
        NoticeCode.MEMORY_FREED,
        NoticeCode.BATCH_HALVED,
    ]
    assert {notice.step for notice in result.notices} == {2}
    assert "BatchHalved: step 2: The GPU's memory is full" in output
    assert output.count("The training goes on from step 2") == 2
    assert "Traceback" not in output + errors
