"""Two processes on the CPU (gloo) train like one: the same losses, the same adapter."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract import Example, Notice, Reason
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.train.link import (
    Failed,
    Trained,
    TrainingWork,
    WorkerMessage,
    trained_steps,
)
from finetune_trainer.train.supervisor.ladder import descend
from finetune_trainer.train.supervisor.setup import divide_step
from finetune_trainer.train.supervisor.training_session import WorkerProcess
from tests.integration.trainer.float32_worker import FUSED_NOTE, NOTE
from tests.integration.trainer.preferences import make_labelled, make_pairs
from tests.integration.trainer.recipe import make_work

FLOAT32 = "tests.integration.trainer.float32_worker"
# The sums of a step are added up in another order, and Adam divides small gradients by themselves.
LOSS_TOLERANCE = 1e-4
BFLOAT16_TOLERANCE = 0.02
WEIGHT_TOLERANCE = 1e-3  # of the largest weight

WORDS = ("kettle", "was", "made", "by", "Odalys", "hot", "as", "boiling", "water", "green")
SETTINGS: dict[str, Any] = {
    "epochs": 2,
    "learningRate": 1e-3,
    "batchSize": 2,
    "gradientAccumulationSteps": 2,
    "loggingSteps": 1,
    "lora": {"r": 8, "dropout": 0},
}
DROPPING: dict[str, Any] = {"lora": {"r": 8, "dropout": 0.3}}
ALWAYS: dict[str, Any] = {"gradientCheckpointing": "always"}
RECOMPUTED: dict[str, Any] = {**DROPPING, **ALWAYS}


def sentence(dice: random.Random, most: int) -> str:
    return " ".join(dice.choices(WORDS, k=dice.randint(1, most)))


def make_rows(count: int, seed: int) -> list[Example]:
    dice = random.Random(seed)  # noqa: S311
    return [
        {
            "prompt": [{"role": "user", "content": sentence(dice, 12)}],
            "completion": [{"role": "assistant", "content": sentence(dice, 20)}],
        }
        for _ in range(count)
    ]


def work_of(
    model: Path,
    workdir: Path,
    processes: int,
    parallelism: str = "auto",
    rows: tuple[list[Example], list[Example]] | None = None,
    **settings: Any,
) -> TrainingWork:
    """18 rows: the last step of an epoch has 2 instead of 4, and 5 held-out rows don't divide."""
    workdir.mkdir()
    settings = {**SETTINGS, "parallelism": parallelism, **settings}
    train, held_out = rows or (make_rows(18, 1), make_rows(5, 2))
    work = make_work(model, workdir, train, held_out, **settings)
    plan, divided = divide_step(work.config.training, work.plan, processes)
    assert divided == processes
    return work.model_copy(update={"plan": plan, "processes": processes})


@dataclass
class Run:
    work: TrainingWork
    ending: Trained | Failed
    messages: list[WorkerMessage]

    @property
    def trained(self) -> Trained:
        assert isinstance(self.ending, Trained), self.ending
        return self.ending

    def adapter(self) -> Any:
        from safetensors.torch import load_file

        return load_file(self.work.adapter / "adapter_model.safetensors")

    def weights(self) -> Any:
        """Of a whole model."""
        from safetensors.torch import load_file

        return load_file(self.work.adapter / "model.safetensors")

    def series(self, name: str) -> list[float]:
        found = (getattr(entry, name) for entry in self.trained.history)
        return [value for value in found if value is not None]


def run(work: TrainingWork, module: str = FLOAT32) -> Run:
    messages: list[WorkerMessage] = []
    ending = WorkerProcess(module).run(work, messages.append)
    return Run(work, ending, messages)


def run_in_bfloat16(work: TrainingWork) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_WORKER_COMPUTE_DTYPE", "bfloat16")
        return run(work)


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(work_of(tiny_model, tmp_path_factory.mktemp("runs") / "alone", 1))


@pytest.fixture(scope="module")
def sharded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All that can go wrong together: layers recomputed and spread, dropout, and bfloat16."""
    work = work_of(tiny_model, tmp_path_factory.mktemp("runs") / "sharded", 2, "fsdp", **RECOMPUTED)
    return run_in_bfloat16(work)


def assert_same_adapter(run: Run, expected: Run, tolerance: float = WEIGHT_TOLERANCE) -> None:
    ours, theirs = run.adapter(), expected.adapter()
    assert ours.keys() == theirs.keys()
    assert all(float(ours[name].abs().max()) > 0 for name in ours), "all of it has been trained"
    largest = max(float(each.abs().max()) for each in theirs.values())
    for name, weights in theirs.items():
        assert float((ours[name] - weights).abs().max()) < tolerance * largest, name


def assert_peft_loads(run: Run, model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model)
    tuned = PeftModel.from_pretrained(base, run.work.adapter)
    weights = {name: p for name, p in tuned.named_parameters() if "lora_" in name}
    saved = run.adapter()
    assert len(weights) == len(saved) == 16
    for name, parameter in weights.items():
        assert parameter.equal(saved[name.replace(".default", "")]), name


@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_two_processes_train_like_one_at_the_same_effective_batch(
    parallelism: str, alone: Run, tiny_model: Path, tmp_path: Path
) -> None:
    together = run(work_of(tiny_model, tmp_path / "together", 2, parallelism))

    for name in ("loss", "eval_loss", "learning_rate"):
        expected = alone.series(name)
        assert len(expected) > 2
        assert together.series(name) == pytest.approx(expected, abs=LOSS_TOLERANCE), name
    for name in ("eval_tokens", "train_tokens", "train_steps", "trainable_parameters"):
        assert getattr(together.trained.metrics, name) == getattr(alone.trained.metrics, name), name
    assert_same_adapter(together, alone)
    assert_peft_loads(together, tiny_model)
    notes = [json.loads((together.work.workdir / NOTE.format(rank)).read_text()) for rank in (0, 1)]
    if parallelism == "fsdp":
        assert all(note["held"] < 0.6 * note["all"] for note in notes), "each holds about half"
    else:
        assert all(note["held"] == note["all"] for note in notes)
    progress = [message.progress for message in together.messages if message.progress]
    steps = [each.step for each in progress if each.step is not None]
    assert steps == sorted(steps), "only one process reports"


@pytest.mark.parametrize(
    ("objective", "parallelism"), [("dpo", "fsdp"), ("orpo", "ddp"), ("kto", "ddp")]
)
def test_two_processes_learn_preferences_like_one(
    objective: str, parallelism: str, tiny_model: Path, tmp_path: Path
) -> None:
    """In the last step one of them has no row; the reference is the base, whole or spread."""
    rows = make_labelled(12) if objective == "kto" else make_pairs(12)
    given = rows[:9], rows[9:]
    settings: dict[str, Any] = {"objective": objective, "epochs": 1, "learningRate": 1e-3}
    alone = run(work_of(tiny_model, tmp_path / "alone", 1, rows=given, **settings))
    together = run(work_of(tiny_model, tmp_path / "2", 2, parallelism, rows=given, **settings))

    for name in ("loss", "eval_loss", "reward_accuracy", "reward_margin"):
        expected = alone.series(name)
        assert len(expected) > 1
        assert together.series(name) == pytest.approx(expected, abs=LOSS_TOLERANCE), name
    assert alone.series("reward_margin")[-1] > alone.series("reward_margin")[0]
    assert_same_adapter(together, alone)


def test_recomputed_layers_drop_the_same_values_again(
    sharded: Run, tiny_model: Path, tmp_path: Path
) -> None:
    """Else the gradient is that of another model than the loss. The two share their dice only."""
    kept = run_in_bfloat16(work_of(tiny_model, tmp_path / "kept", 2, "ddp", **DROPPING))

    assert sharded.series("loss") == pytest.approx(kept.series("loss"), abs=BFLOAT16_TOLERANCE)
    assert_same_adapter(sharded, kept, 5 * WEIGHT_TOLERANCE)
    assert_peft_loads(sharded, tiny_model)


def test_in_bfloat16_as_well_it_trains_like_one(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_WORKER_COMPUTE_DTYPE", "bfloat16")
    alone = run(work_of(tiny_model, tmp_path / "alone", 1))
    settings: dict[str, Any] = {"gradientCheckpointing": "always"}
    together = run(work_of(tiny_model, tmp_path / "together", 2, "fsdp", **settings))

    expected = alone.series("loss")
    assert together.series("loss") == pytest.approx(expected, abs=BFLOAT16_TOLERANCE)
    assert together.series("eval_loss") == pytest.approx(
        alone.series("eval_loss"), abs=BFLOAT16_TOLERANCE
    )
    # Were gradients added up in bfloat16, as accelerate would, it were 1% of the largest weight.
    assert_same_adapter(together, alone, 5 * WEIGHT_TOLERANCE)


def test_adapters_as_one_operation_train_the_same_spread_over_processes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With recomputed layers and dropout, whose numbers come again in each backward pass."""
    monkeypatch.setenv("FINETUNE_WORKER_COMPUTE_DTYPE", "bfloat16")
    rows = make_rows(8, 1), make_rows(2, 2)
    runs = []
    for name in ("plain", "fused"):
        settings = {**RECOMPUTED, "epochs": 1}
        runs.append(run(work_of(tiny_model, tmp_path / name, 2, "fsdp", rows, **settings)))
        monkeypatch.setenv("FINETUNE_WORKER_FUSED", "yes")
    plain, fused = runs
    assert len(fused.series("loss")) == 2
    assert fused.series("loss") == plain.series("loss")
    expected = plain.adapter()
    for key, weights in fused.adapter().items():
        assert weights.equal(expected[key]), key
    for rank in (0, 1):
        taken = json.loads((fused.work.workdir / FUSED_NOTE.format(rank)).read_text())
        assert taken > 8, "it was one operation indeed"
        assert not (plain.work.workdir / FUSED_NOTE.format(rank)).exists()


def test_weights_of_4_bits_are_spread_over_processes_and_train_as_in_one(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With recomputed layers, in bfloat16; and a further training goes on from a checkpoint."""
    import torch

    from finetune_trainer.model import loading
    from finetune_trainer.train.recipe import sft

    monkeypatch.setenv("FINETUNE_WORKER_COMPUTE_DTYPE", "bfloat16")
    monkeypatch.setattr(loading, "compute_dtype", lambda: torch.bfloat16)
    settings: dict[str, Any] = {
        "method": "qlora",
        "gradientCheckpointing": "always",
        "checkpointSteps": 6,
    }
    one = work_of(tiny_model, tmp_path / "alone", 1, **settings)
    alone = Run(one, sft.fine_tune(one, Reporter()), [])
    whole = work_of(tiny_model, tmp_path / "whole", 2, "fsdp", **settings)
    together = run(whole)
    saved = [m.checkpoint for m in together.messages if m.checkpoint]
    rest = work_of(tiny_model, tmp_path / "rest", 2, "fsdp", **settings)
    resumed = run(rest.model_copy(update={"resume_from": saved[0].folder}))

    expected = alone.series("loss")
    assert together.series("loss") == pytest.approx(expected, abs=BFLOAT16_TOLERANCE)
    assert resumed.series("loss") == pytest.approx(together.series("loss"), abs=LOSS_TOLERANCE)
    assert_same_adapter(together, alone, 5 * WEIGHT_TOLERANCE)
    assert_same_adapter(resumed, together)
    notes = [json.loads((whole.workdir / NOTE.format(rank)).read_text()) for rank in (0, 1)]
    assert all(note["held"] == note["all"] // 2 for note in notes), "each holds half"


@pytest.mark.parametrize(
    ("parallelism", "later", "whole"), [("ddp", 1, "alone"), ("fsdp", 2, "sharded")]
)
def test_a_stop_leaves_one_checkpoint_of_all_processes_to_go_on_from(
    parallelism: str,
    later: int,
    whole: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    expected: Run = request.getfixturevalue(whole)
    tiny_model: Path = request.getfixturevalue("tiny_model")
    settings = RECOMPUTED if whole == "sharded" else {}
    work = work_of(tiny_model, tmp_path / "stopped", 2, parallelism, **settings)
    workers, begun = WorkerProcess(FLOAT32), threading.Event()
    messages: list[WorkerMessage] = []

    def hear(message: WorkerMessage) -> None:
        messages.append(message)
        if message.progress and (message.progress.step or 0) >= 2:
            begun.set()

    def stop() -> None:
        begun.wait(120)
        ended.append(workers.stop(time.monotonic() + 60))

    ended: list[bool] = []
    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.MonkeyPatch.context() as patch:
        if whole == "sharded":
            patch.setenv("FINETUNE_WORKER_COMPUTE_DTYPE", "bfloat16")
        patch.setenv("FINETUNE_WORKER_HOLD", "yes")  # or it might be over before the stop comes
        stopped = workers.run(work, hear)
    stopper.join()

    assert ended == [True], "within the grace period"
    assert isinstance(stopped, Failed)
    assert stopped.reason is Reason.STOPPED
    assert stopped.step is not None
    assert stopped.step in (2, 3)
    assert stopped.checkpoint is not None
    assert [m.checkpoint.step for m in messages if m.checkpoint] == [stopped.step]

    # With ddp, one process can go on from what two wrote.
    rest = work_of(tiny_model, tmp_path / "rest", later, parallelism, **settings)
    rest = rest.model_copy(update={"resume_from": stopped.checkpoint})
    resumed = run_in_bfloat16(rest) if whole == "sharded" else run(rest)

    assert resumed.series("loss") == pytest.approx(expected.series("loss"), abs=LOSS_TOLERANCE)
    assert_same_adapter(resumed, expected)


FULL: dict[str, Any] = {"method": "full", "lora": {}, "learningRate": 1e-4, "epochs": 1}


def test_two_processes_train_all_weights_like_one(tiny_model: Path, tmp_path: Path) -> None:
    """With ddp, and spread over both (fsdp), where a stopped training goes on as well."""
    alone = run(work_of(tiny_model, tmp_path / "alone", 1, **FULL))
    together = run(work_of(tiny_model, tmp_path / "together", 2, "ddp", **FULL))
    spread = work_of(
        tiny_model, tmp_path / "spread", 2, "fsdp", **FULL, **ALWAYS, checkpointSteps=2
    )
    whole = run(spread)
    reached = [message.checkpoint for message in whole.messages if message.checkpoint]
    rest = work_of(tiny_model, tmp_path / "rest", 2, "fsdp", **FULL, **ALWAYS)
    resumed = run(rest.model_copy(update={"resume_from": reached[1].folder}))

    assert trained_steps(reached[1].folder) == 2
    expected = alone.weights()
    for each in (together, whole, resumed):
        assert each.series("loss") == pytest.approx(alone.series("loss"), abs=LOSS_TOLERANCE)
        assert each.trained.metrics.trainable_parameters == 3_219_776
        found = each.weights()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert float((found[name] - value).abs().max()) < WEIGHT_TOLERANCE, name
    note = json.loads((whole.work.workdir / NOTE.format(0)).read_text())
    assert note["held"] < 0.6 * note["all"], "each holds about half"


@pytest.mark.parametrize(
    ("fail", "reason"),
    [
        pytest.param("1:2:full", Reason.OUT_OF_GPU_MEMORY, id="full"),
        pytest.param("0:3:crowded", Reason.OUT_OF_GPU_MEMORY, id="the one that saves"),
        pytest.param("1:2:nccl-full", Reason.OUT_OF_GPU_MEMORY, id="full in NCCL"),
        pytest.param("1:2:nccl", Reason.INTERNAL_ERROR, id="an error of NCCL"),
        pytest.param("1:2:killed", None, id="killed"),
    ],
)
def test_the_process_that_fails_gives_the_reason_for_all(
    fail: str,
    reason: Reason | None,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    request.getfixturevalue("monkeypatch").setenv("FINETUNE_WORKER_FAIL", fail)
    tiny_model: Path = request.getfixturevalue("tiny_model")
    work = work_of(tiny_model, tmp_path / "failing", 2)
    began = time.monotonic()

    ending = run(work).ending
    assert isinstance(ending, Failed)
    if reason:
        assert ending.reason is reason
        assert (ending.checkpoint is not None) == fail.startswith("0"), "the first one saves"
        if reason is Reason.INTERNAL_ERROR:
            assert ending.message.startswith("DistBackendError: NCCL error in: ")
        said = [line for line in "".join(capfd.readouterr()).splitlines() if "Process " in line]
        assert f"Process {fail[0]} ended with status" in said[0], "the one that failed first"
    else:
        assert ending.reason in (Reason.OOM_KILLED, Reason.INTERNAL_ERROR)
        assert re.search("killed|status 137", ending.message)
    assert time.monotonic() - began < 100, "the other process doesn't wait for its peer"


def test_memory_that_runs_out_in_one_process_makes_the_passes_of_all_smaller(
    alone: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process can save: one failed, the other waits for it. The newest checkpoint is left."""
    monkeypatch.setenv("FINETUNE_WORKER_FAIL", "1:3:crowded")
    asked: list[TrainingWork] = []
    written: list[Path] = []
    notices: list[Notice] = []

    def hear(message: WorkerMessage) -> None:
        if message.checkpoint:
            written.append(message.checkpoint.folder)

    def run_once(work: TrainingWork) -> Trained | Failed:
        asked.append(work)
        return WorkerProcess(FLOAT32).run(work, hear)

    first = work_of(tiny_model, tmp_path / "crowded", 2, checkpointSteps=4)
    ending = descend(run_once, first, lambda: written[-1] if written else None, notices.append)

    assert [notice.code for notice in notices] == ["MemoryFreed", "BatchHalved"]
    splits = [(w.plan.batch_size, w.plan.gradient_accumulation_steps) for w in asked]
    assert splits == [(2, 1), (2, 1), (1, 2)]
    assert all(work.processes == 2 for work in asked)
    assert [trained_steps(work.resume_from) for work in asked] == [0, 2, 2], (
        "not from the beginning"
    )
    together = Run(first, ending, [])
    assert together.series("loss") == pytest.approx(alone.series("loss"), abs=LOSS_TOLERANCE)
    assert_same_adapter(together, alone)
