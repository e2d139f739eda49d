"""The engine, the number of processes and each one's share: decisions, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract import (
    NoticeCode,
    Reason,
    RunConfig,
    StageError,
    Tracker,
    Training,
    TrainingPlan,
)
from finetune_trainer.memory.gpus import Gpu
from finetune_trainer.train.supervisor.setup import (
    EngineChoice,
    MemoryNeeds,
    adapt_to_machine,
    beyond_context,
    choose_engine,
    count_devices,
    divide_step,
    missing_for_unsloth,
    read_model_type,
)
from finetune_trainer.train.supervisor.training_session import (
    worker_command,
    worker_environment,
)
from tests.unit.trainer.training_work import work_in

H100 = Gpu("NVIDIA H100", 80 << 30, (9, 0))
OLD = Gpu("Tesla P100", 16 << 30, (6, 0))


def config(engine: str = "auto", training: dict[str, Any] | None = None, **model: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"source": "org/name", **model},
            "dataset": {"source": "/data.csv"},
            "output": {"uri": "/out"},
            "training": {"engine": engine, **(training or {})},
        }
    )


@pytest.mark.parametrize("wanted", ["auto", "unsloth"])
@pytest.mark.parametrize(
    ("changed", "obstacle"),
    [
        pytest.param({}, None, id="one GPU, installed, a model type that it knows"),
        pytest.param({"gpus": ()}, "there is no NVIDIA GPU", id="no GPU"),
        pytest.param({"missing": "it isn't there"}, "it isn't there", id="not installed"),
        pytest.param({"gpus": (H100, H100), "processes": 2}, "here are 2", id="two processes"),
        pytest.param({"gpus": (H100, H100)}, None, id="two GPUs, one of which is used"),
        pytest.param({"gpus": (OLD,)}, "compute capability 6.0", id="too old a GPU"),
        pytest.param({"model_type": "gpt2"}, "the model type gpt2", id="another model type"),
        pytest.param({"model_type": None}, "the model type None", id="no model type"),
        pytest.param({"method": "full"}, "it trains adapters only", id="all weights"),
    ],
)
def test_unsloth_trains_where_it_can(
    wanted: str, changed: dict[str, Any], obstacle: str | None
) -> None:
    case = {"gpus": (H100,), "processes": 1, "model_type": "llama", "missing": None, **changed}
    training = {"method": case.pop("method", "lora")}

    choice = choose_engine(config(wanted, training), **case)

    assert choice.engine == ("unsloth" if obstacle is None else "transformers")
    notice = choice.notice(wanted)
    if obstacle is None:
        assert choice.obstacle is None
        assert notice is None
    else:
        assert obstacle in str(choice.obstacle)
        # Nobody expects Unsloth who has not asked for it by name.
        assert (notice is None) == (wanted == "auto")
    if notice:
        assert notice.code == NoticeCode.ENGINE_FALLBACK
        assert str(choice.obstacle) in notice.evidence


def test_preferences_are_learnt_without_unsloth() -> None:
    preferences = config("unsloth").model_copy(update={"training": Training(objective="dpo")})

    choice = choose_engine(preferences, gpus=(H100,), processes=1, model_type="llama", missing=None)

    assert choice.engine == "transformers"
    assert "not dpo" in str(choice.obstacle)


def test_transformers_asked_for_is_no_fallback() -> None:
    choice = choose_engine(
        config("transformers"), gpus=(H100,), processes=1, model_type="llama", missing=None
    )

    assert choice == EngineChoice("transformers")
    assert choice.notice("transformers") is None


def test_code_that_comes_with_a_model_is_left_to_transformers() -> None:
    trusted = config("unsloth", trustRemoteCode=True)

    choice = choose_engine(trusted, gpus=(H100,), processes=1, model_type="llama", missing=None)

    assert choice.engine == "transformers"
    assert "trustRemoteCode" in str(choice.obstacle)


def install(site: Path, name: str, version: str, *requires: str) -> None:
    """The metadata of an installed package."""
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {each}" for each in requires]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("requires", "missing"),
    [
        (["peft>=0.18", "left>=1; sys_platform == 'none'", "more; extra == 'colab'"], None),
        (["trl<=1.14.0"], "Unsloth 2026.10.7 needs trl<=1.14.0, and 1.15.0 is installed"),
        (["no-such-package"], "Unsloth 2026.10.7 needs no-such-package, which isn't installed"),
        (["torch<2.15,>=2.4"], None),
    ],
)
def test_unsloth_counts_as_installed_with_all_that_it_asks_for(
    requires: list[str], missing: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "unsloth", "2026.10.7", *requires)
    install(tmp_path, "trl", "1.15.0")
    install(tmp_path, "peft", "0.21.2")
    install(tmp_path, "torch", "2.13.0+cpu")
    monkeypatch.syspath_prepend(tmp_path)

    assert missing_for_unsloth() == missing


@pytest.mark.parametrize(
    ("text", "found"),
    [('{"model_type": "llama"}', "llama"), ("{}", None), ("[]", None), ("{", None), (None, None)],
)
def test_the_model_type_is_read_from_config_json(
    text: str | None, found: str | None, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)

    assert read_model_type(tmp_path) == found


@pytest.mark.parametrize(
    ("gpus", "variable", "processes"),
    [(0, None, 1), (4, None, 4), (0, "2", 2), (4, "2", 4), (0, "two", 1), (0, "0", 1)],
)
def test_a_process_for_each_gpu(gpus: int, variable: str | None, processes: int) -> None:
    environment = {} if variable is None else {"FINETUNE_PROCESSES": variable}

    assert count_devices(gpus, environment) == processes


def training(batch: int, accumulation: int, parallelism: str = "auto", **more: Any) -> Training:
    return Training.model_validate(
        {
            "batchSize": batch,
            "gradientAccumulationSteps": accumulation,
            "parallelism": parallelism,
            **more,
        }
    )


def plan(rows: int, parallelism: str = "none") -> TrainingPlan:
    return TrainingPlan.model_validate(
        {
            "batchSize": rows,
            "gradientAccumulationSteps": 1,
            "gradientCheckpointing": False,
            "parallelism": parallelism,
        }
    )


@pytest.mark.parametrize(
    ("spec", "planned", "devices", "expected"),
    [
        pytest.param(training(2, 4), plan(2), 1, (1, 2, 4, "none"), id="one device: as written"),
        pytest.param(training(2, 4), plan(2), 2, (2, 2, 2, "ddp"), id="two"),
        pytest.param(training(2, 4), plan(2), 8, (8, 1, 1, "ddp"), id="as many as examples"),
        pytest.param(training(2, 4), plan(2), 3, (2, 2, 2, "ddp"), id="three don't divide eight"),
        pytest.param(training(1, 1), plan(1), 4, (1, 1, 1, "none"), id="one example, one device"),
        pytest.param(training(2, 6), plan(2), 4, (4, 1, 3, "ddp"), id="two don't divide three"),
        pytest.param(training(2, 4), plan(4), 1, (1, 4, 2, "none"), id="prepare found four to fit"),
        pytest.param(training(2, 4, "fsdp"), plan(2), 2, (2, 2, 2, "fsdp"), id="asked for fsdp"),
        pytest.param(training(2, 4, "fsdp"), plan(2), 1, (1, 2, 4, "none"), id="fsdp on one"),
        pytest.param(training(2, 4), plan(2, "fsdp"), 2, (2, 2, 2, "fsdp"), id="planned fsdp"),
    ],
)
def test_the_effective_batch_stays_however_many_share_it(
    spec: Training, planned: TrainingPlan, devices: int, expected: tuple[int, int, int, str]
) -> None:
    divided, processes = divide_step(spec, planned, devices)

    rows, passes = divided.batch_size, divided.gradient_accumulation_steps
    assert (processes, rows, passes, divided.parallelism) == expected
    assert processes * rows * passes == spec.batch_size * spec.gradient_accumulation_steps


def test_a_model_that_needs_all_devices_is_not_squeezed_into_fewer() -> None:
    remedy = "set training.gradientAccumulationSteps to a multiple of 2"
    with pytest.raises(StageError, match=remedy) as caught:
        divide_step(training(1, 3), plan(1, "fsdp"), 2)

    assert caught.value.reason is Reason.INVALID_CONFIG


def test_one_process_is_started_directly_and_several_through_torchrun() -> None:
    one = worker_command("worker", Path("/tmp/socket"), 1, 24.0)
    several = worker_command("worker", Path("/tmp/socket"), 4, 24.0)

    assert one[1:] == ["-m", "worker", "/tmp/socket"]
    assert several[2] == "finetune_trainer.train.recipe.processes"
    assert {"--nproc-per-node=4", "--shutdown-timeout=24"} <= set(several)
    assert several[-3:] == ["--module", "worker", "/tmp/socket"]


@pytest.mark.parametrize(
    ("processes", "given", "expected"),
    [(1, None, "0"), (1, "2,3", "2"), (1, "", ""), (2, None, None), (2, "2,3", "2,3")],
)
def test_one_process_sees_one_gpu(processes: int, given: str | None, expected: str | None) -> None:
    """With more the Trainer would use DataParallel, and TRL refuses that."""
    environment = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}

    seen = worker_environment(processes, [], environment)

    assert seen.get("CUDA_VISIBLE_DEVICES") == expected


TRACKING = {
    Tracker.MLFLOW: {"MLFLOW_TRACKING_URI": "http://mlflow", "MLFLOW_TRACKING_TOKEN": "m"},
    Tracker.WANDB: {"WANDB_API_KEY": "w", "WANDB_PROJECT": "mine"},
    Tracker.TENSORBOARD: {},
}


@pytest.mark.parametrize("trackers", [[], *([each] for each in Tracker), [*Tracker]])
def test_a_worker_gets_what_tunes_it_and_the_keys_of_its_trackers_alone(
    trackers: list[Tracker],
) -> None:
    tuning = {
        "CUDA_VISIBLE_DEVICES": "0",
        "FI_PROVIDER": "efa",
        "HF_HOME": "/cache",
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "4",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }
    keys = {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/secrets/token",
        "FINETUNE_HUB_TOKEN": "h",
        "FINETUNE_MODEL_AWS_SECRET_ACCESS_KEY": "s",
        "HF_TOKEN": "t",
        "NCCL_API_KEY": "n",
    }
    given = {**tuning, **keys, **{n: v for each in TRACKING.values() for n, v in each.items()}}

    seen = worker_environment(2, trackers, given)

    assert seen == {**tuning, **{n: v for each in trackers for n, v in TRACKING[each].items()}}


@pytest.mark.parametrize(("longest", "context"), [(8192, 8192), (9000, None)])
def test_rows_within_the_context_are_no_news(longest: int, context: int | None) -> None:
    assert beyond_context(longest, context) is None


def test_rows_beyond_the_models_context_are_said() -> None:
    notice = beyond_context(9000, 8192)

    assert notice is not None
    assert notice.code == NoticeCode.BEYOND_CONTEXT
    assert "9000 tokens" in notice.evidence
    assert "maxSequenceLength to 8192" in notice.remedy


def test_the_training_is_told_of_rows_beyond_the_context(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 512}')
    needs = MemoryNeeds(None, 600)

    work, notices = adapt_to_machine(work_in(tmp_path), needs, ())

    assert work.engine == "transformers"
    assert [notice.code for notice in notices] == [NoticeCode.BEYOND_CONTEXT]
    within, none = adapt_to_machine(work_in(tmp_path), MemoryNeeds(None, 512), ())
    assert within == work
    assert none == []
