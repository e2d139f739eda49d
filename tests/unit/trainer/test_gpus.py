"""A GPU that was asked for is used, or the training ends and says why not."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from finetune_trainer.__main__ import app
from finetune_trainer.contract import (
    Fingerprints,
    PreparedRunConfig,
    Reason,
    Resolved,
    StageError,
)
from finetune_trainer.memory.gpus import (
    Driver,
    Gpu,
    Gpus,
    TorchBuild,
    check_gpus,
    describe_gpus,
    first_visible,
)
from finetune_trainer.memory.machine import find_gpus
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.train.train_stage import run

H100 = Gpu("NVIDIA H100", 80 << 30, (9, 0))
V100 = Gpu("Tesla V100", 16 << 30, (7, 0))
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
CUDA13 = TorchBuild("2.13.0", cuda="13.0", architectures=ARCHITECTURES)
NEW = Driver("580.95.05", (13, 0), (H100,))

WORKING = Gpus(("nvidia0",), NEW, torch=replace(CUDA13, gpus=(H100,)))
NO_LIBRARY = "NVML Shared Library Not Found"


@pytest.mark.parametrize(
    ("found", "parts"),
    [
        pytest.param(
            replace(WORKING, torch=TorchBuild("2.13.0+cpu")),
            ["torch 2.13.0+cpu of this image is built for CPUs only", "a CUDA build"],
            id="the CPU image",
        ),
        pytest.param(
            Gpus(driver_error=NO_LIBRARY, torch=CUDA13),
            ["no /dev/nvidia*", "spec.stages.train.runtimeClassName"],
            id="no runtimeClassName",
        ),
        pytest.param(
            Gpus(("nvidia0",), driver_error=NO_LIBRARY, torch=CUDA13),
            ["libnvidia-ml.so.1 isn't", "NVIDIA_DRIVER_CAPABILITIES"],
            id="a device without its library",
        ),
        pytest.param(
            replace(WORKING, driver=Driver("550.54.15", (12, 4), (H100,)), torch=CUDA13),
            [
                "driver 550.54.15 runs CUDA up to 12.4",
                "built for CUDA 13.0",
                "driver to 580.65.06 or newer",
                "torch for CUDA 12",
            ],
            id="an old driver",
        ),
        pytest.param(
            Gpus(("nvidia0",), driver_error="Driver/library version mismatch", torch=CUDA13),
            ["does not answer (Driver/library version mismatch)", "restart the node"],
            id="a driver that was upgraded under way",
        ),
        pytest.param(
            replace(WORKING, driver=replace(NEW, gpus=(V100,)), torch=CUDA13),
            ["Tesla V100 has compute capability 7.0", "sm_75", "compute capability 7.5 or newer"],
            id="no kernels for it",
        ),
        pytest.param(
            replace(WORKING, torch=CUDA13, hidden_by=""),
            ["CUDA_VISIBLE_DEVICES is ''", "spec.stages.train.env"],
            id="hidden",
        ),
        pytest.param(
            replace(WORKING, torch=replace(CUDA13, error="CUDA error: ECC uncorrectable")),
            ["torch says: CUDA error: ECC uncorrectable", "nvidia-smi"],
            id="broken",
        ),
        pytest.param(
            Gpus(("kfd",), driver_error=NO_LIBRARY, torch=CUDA13),
            ["the GPU is AMD's", "ROCm"],
            id="another maker's",
        ),
        pytest.param(
            Gpus(("nvidia0",), NEW, torch_error="torch can't be loaded: OSError: libcudart.so.13"),
            ["torch can't be loaded: OSError: libcudart.so.13", "intact trainer image"],
            id="torch is broken",
        ),
    ],
)
def test_the_cause_is_named_with_what_to_do(found: Gpus, parts: list[str]) -> None:
    with pytest.raises(StageError) as caught:
        check_gpus(1, found)

    assert caught.value.reason is Reason.GPU_UNAVAILABLE
    assert caught.value.message.startswith("The training has 1 GPU, and torch can't use it: ")
    for part in parts:
        assert part in caught.value.message
    # What `doctor` says is the same.
    if found.present:
        assert any(parts[0] in line for line in describe_gpus(found))


def test_fewer_than_asked_for_are_not_enough() -> None:
    with pytest.raises(StageError, match="torch can use 1 of them: the driver has 1 in this"):
        check_gpus(2, WORKING)
    slice_ = replace(H100, name="NVIDIA H100 MIG 1g.10gb")
    sliced = replace(WORKING, torch=replace(CUDA13, gpus=(slice_,)))
    with pytest.raises(StageError, match="one MIG slice only"):
        check_gpus(2, sliced)


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_gpu_that_works_is_taken(wanted: int) -> None:
    check_gpus(wanted, WORKING)
    # Not installed: torch's word is enough.
    check_gpus(wanted, replace(WORKING, driver=None, driver_error="nvidia-ml-py isn't installed"))
    assert describe_gpus(WORKING) == [
        "GPU: NVIDIA H100, 80.0 GiB, compute capability 9.0",
        "Driver: 580.95.05, CUDA up to 13.0",
        "torch: 2.13.0, built for CUDA 13.0 (driver 580.65.06 or newer) and GPUs of compute "
        "capability 7.5 or newer",
    ]


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((7, 0), False),
        ((7, 5), True),
        ((8, 9), True),
        ((9, 0), True),
        ((12, 1), True),
        ((13, 0), True),
    ],
)
def test_kernels_run_on_later_gpus_of_a_generation_and_others_are_compiled(
    capability: tuple[int, int], runs: bool
) -> None:
    assert CUDA13.runs_on(capability) is runs


def test_what_torch_found_passes_between_two_processes() -> None:
    told = replace(CUDA13, gpus=(H100,), error="one of them is broken")
    assert TorchBuild.parse(json.dumps(asdict(told))) == told


def test_torch_is_asked_only_where_there_may_be_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    assert find_gpus(dev=tmp_path).torch is None
    # There is no driver behind this file, and torch has the last word.
    (tmp_path / "nvidia0").touch()
    found = find_gpus(dev=tmp_path)
    assert found.device_files == ("nvidia0",)
    assert found.torch is not None, found.torch_error
    assert found.usable == ()


@pytest.mark.parametrize(
    ("environment", "first"), [({}, "0"), ({"CUDA_VISIBLE_DEVICES": "3,1"}, "3")]
)
def test_the_first_of_the_visible_gpus(environment: dict[str, str], first: str) -> None:
    assert first_visible(environment) == first


def has_gpu() -> bool:
    return bool(find_gpus(wanted=1).usable)


def test_a_training_that_holds_a_gpu_never_runs_on_the_cpu(tmp_path: Path) -> None:
    """It ends at once: nothing is fetched, since nothing is there to be fetched."""
    if has_gpu():
        pytest.skip("this machine has a GPU that works")
    config = PreparedRunConfig.model_validate(
        {
            "model": {"source": "org/base"},
            "dataset": {"source": "/data.csv"},
            "output": {"uri": str(tmp_path / "store")},
            "hardware": {"gpus": 1},
            "resolved": Resolved(
                fingerprints=Fingerprints(prepare="a" * 64, train="b" * 64, export="c" * 64),
                dataset_etag="etag",
                dataset_rows=28,
                model_revision="d" * 40,
            ),
        }
    )
    with pytest.raises(StageError) as caught:
        run(config, tmp_path, Reporter())
    assert caught.value.reason is Reason.GPU_UNAVAILABLE
    assert caught.value.reason.exit_code == 17
    assert not caught.value.reason.retryable
    # The cause is this machine's own, and `doctor` says it as well.
    cause = caught.value.message.partition("can't use it: ")[2].partition(" of this image")[0]
    told = CliRunner().invoke(app, ["doctor"]).output
    assert cause in told


def test_the_doctor_looks_at_the_machine(tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["doctor", "--workspace", str(tmp_path)])
    assert told.exit_code == 0, told.output
    assert [line.partition(":")[0] for line in told.output.splitlines() if line][-2:] == [
        "Memory",
        "Disk",
    ]
