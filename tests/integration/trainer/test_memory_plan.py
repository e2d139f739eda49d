"""The plan by the command line: too little hardware fails in prepare, enough of it gets a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract import PreparedRunConfig, Reason, StageError, TrainingPlan
from finetune_trainer.memory.gpus import Gpu, Gpus, TorchBuild
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.train import train_stage
from finetune_trainer.train.link import Failed, TrainingWork
from finetune_trainer.train.supervisor import setup, training_session
from tests.integration.trainer.conftest import Trainer

MIB, GIB = 2**20, 2**30


@pytest.fixture
def run_config(run_config: dict[str, Any]) -> dict[str, Any]:
    """The tiny model's run, without GGUF files, whose checks take their time."""
    run_config["export"] = {"merged": True, "gguf": []}
    run_config["training"] |= {"batchSize": 2, "gradientAccumulationSteps": 4}
    return run_config


def plan_of(trainer: Trainer, config: dict[str, Any]) -> TrainingPlan | None:
    run = trainer("prepare", config)
    assert run.code == 0, run.output
    assert run.result is not None
    assert run.result.resolved is not None
    needs = run.result.resolved.needs
    assert needs is not None
    assert needs.train_memory_bytes is not None
    assert needs.export_memory_bytes is not None
    assert GIB < needs.train_memory_bytes < 4 * GIB  # of a tiny model: torch and CUDA, no more
    assert 512 * MIB < needs.export_memory_bytes < 4 * GIB
    assert needs.train_storage_bytes is not None
    assert needs.export_storage_bytes is not None
    assert 256 * MIB < needs.train_storage_bytes < needs.export_storage_bytes < GIB
    return run.result.resolved.plan


def test_a_gpu_that_is_too_small(trainer: Trainer, run_config: dict[str, Any]) -> None:
    run_config["hardware"] = {"gpus": 1, "gpuMemoryBytes": 256 * MIB}
    run = trainer("prepare", run_config)
    assert run.code == 12, run.output
    assert run.result is not None
    assert run.result.reason is Reason.OUT_OF_GPU_MEMORY
    assert "the GPU has 256 MiB" in run.result.message
    assert "a GPU with 8 GiB" in run.result.message
    assert "Traceback" not in run.output


def test_a_gpu_with_room(trainer: Trainer, run_config: dict[str, Any]) -> None:
    run_config["hardware"] = {"gpus": 1, "gpuMemoryBytes": 24 * GIB}
    plan = plan_of(trainer, run_config)
    assert plan is not None
    assert (plan.batch_size, plan.gradient_accumulation_steps) == (8, 1)
    assert not plan.gradient_checkpointing
    assert plan.device_bytes is not None
    assert 500 * MIB < plan.device_bytes < GIB
    # It is worked out again from the examples in the store, for other hardware.
    run_config["hardware"] = {"gpus": 2, "gpuMemoryBytes": 24 * GIB}
    again = plan_of(trainer, run_config)
    assert again is not None
    assert (again.batch_size, again.gradient_accumulation_steps) == (4, 1)
    assert again.parallelism == "ddp"


def test_a_pod_with_too_little_disk(trainer: Trainer, run_config: dict[str, Any]) -> None:
    run_config["hardware"] = {"memoryBytes": 8 * GIB, "ephemeralStorageBytes": 64 * MIB}
    run = trainer("prepare", run_config)
    assert run.code == 13, run.output
    assert run.result is not None
    assert run.result.reason is Reason.OUT_OF_DISK
    assert "stages.train.resources.limits.ephemeral-storage" in run.result.message


def test_a_pod_whose_gpu_nobody_knew_finds_out_before_it_loads_the_model(
    trainer: Trainer, run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in trainer.environment.items():
        monkeypatch.setenv(name, value)
    run_config["hardware"] = {"gpus": 1}
    prepared = trainer("prepare", run_config)
    assert prepared.result is not None
    resolved = prepared.result.resolved
    assert resolved is not None
    assert resolved.plan is not None, "the split of the spec"
    assert (resolved.plan.batch_size, resolved.plan.memory_bytes) == (2, None)
    config = PreparedRunConfig.model_validate(
        {**run_config, "resolved": resolved.model_dump(mode="json")}
    )

    def planned(memory: int) -> TrainingPlan:
        workdir = tmp_path / str(memory)
        workdir.mkdir()
        small = TorchBuild("2.13.0", gpus=(Gpu("Small", memory, (9, 0)),))
        monkeypatch.setattr(setup, "find_gpus", lambda _wanted: Gpus(torch=small))
        asked: list[TrainingPlan] = []

        def run(_: training_session.WorkerProcess, work: TrainingWork, *__: object) -> Failed:
            asked.append(work.plan)
            return Failed(reason=Reason.STOPPED, message="This worker trains nothing.")

        monkeypatch.setattr(training_session.WorkerProcess, "run", run)
        with pytest.raises(StageError) as raised:
            train_stage.run(config, workdir, Reporter())
        if not asked:
            raise raised.value
        return asked[0]

    enough = planned(24 * GIB)
    assert (enough.batch_size, enough.gradient_accumulation_steps) == (8, 1)
    assert not enough.gradient_checkpointing
    with pytest.raises(StageError, match="the GPU has 256 MiB") as raised:
        planned(256 * MIB)
    assert raised.value.reason is Reason.OUT_OF_GPU_MEMORY
