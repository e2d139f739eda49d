"""One machine without Kubernetes: what `make train`, `make merge` and `make gguf` call."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_trainer.contract import StageError
from finetune_trainer.local import steps
from tests.integration.trainer.conftest import ATTENTION, MLP, Trainer, write_csv


class Local:
    """The command, in a folder of its own."""

    def __init__(self, trainer: Trainer) -> None:
        self.environment = trainer.full_environment
        self.folder = trainer.folder

    def __call__(self, *arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "finetune_trainer", "local", *arguments],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        output = done.stdout + done.stderr
        assert done.returncode == code, output
        assert "Traceback" not in output
        return output

    def files(self, name: str) -> set[str]:
        return {path.name for path in (self.folder / "models" / name).iterdir()}


@pytest.fixture
def local(trainer: Trainer) -> Local:
    return Local(trainer)


def test_train_merge_and_convert(local: Local, tiny_model: Path) -> None:
    write_csv(local.folder / "my.csv")
    train = [
        "train",
        "--dataset=my.csv",
        f"--base-model={tiny_model}",
        "--epochs=40",
        "--learning-rate=0.005",
        "--gradient-accumulation-steps=1",
        "--lora-r=32",
        "--lora-dropout=0",
        *(f"--target-modules={name}" for name in (*ATTENTION, *MLP)),
    ]
    output = local(*train)
    for said in (
        "Device: CPU, 1 thread",
        f"Model: {tiny_model} (lora)",
        "Trainable parameters / base parameters: 65,536 / 3,219,776 (2.0354%)",
        "Training examples: 6, epochs: 40",
        "step 10/120  epoch 3.33  loss ",
        "learning rate ",
    ):
        assert said in output
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= local.files("lora_adapter")
    assert "it is taken as it is" in local(*train)

    local("merge")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= local.files("merged")

    output = local("gguf", "--quantizations=Q8_0", "--quantizations=Q4_K_M")
    assert local.files("gguf") == {"tiny-Q8_0.gguf", "tiny-Q4_K_M.gguf"}
    modelfile = (local.folder / "models" / "Modelfile").read_text()
    assert "FROM ./gguf/tiny-Q8_0.gguf\n" in modelfile
    assert 'TEMPLATE """{{ if .System }}<|im_start|>system\n' in modelfile
    rows = [line for line in output.splitlines() if line.strip().endswith("✓ passed")]
    assert [row.split()[0] for row in rows] == ["tiny-Q8_0.gguf", "tiny-Q4_K_M.gguf"]

    limits = [{"quantization": "Q4_K_M", "maxKLDivergence": 1e-9}]
    local(*train, f"--set=export.qualityLimits={json.dumps(limits)}")
    output = local("gguf", "--quantizations=Q4_K_M", code=15)
    assert "1 of 1 GGUF files falls short and is kept apart in rejected/" in output
    assert local.files("rejected") == {"tiny-Q4_K_M.gguf"}
    assert local.files("gguf") == set()
    assert "Modelfile" not in local.files("."), "the former one names files that are gone"


def test_what_comes_first_is_said(local: Local) -> None:
    assert "run `make train` first" in local("merge", code=11)
    assert "run `make train` first" in local("gguf", code=11)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--dataset=none.csv", "--base-model=a/b"], 10, "There is no dataset at "),
        (["--epochs=0", "--base-model=a/b"], 11, "training.epochs: must be a whole number"),
        (
            ["--set=training.engine=best", "--base-model=a/b"],
            11,
            "training.engine: Input should be",
        ),
        (["--learning-rate=2", "--base-model=a/b"], 11, "training.learningRate: Input should be"),
    ],
)
def test_bad_arguments(local: Local, arguments: list[str], code: int, said: str) -> None:
    assert said in local("train", *arguments, code=code)


def test_the_sample_dataset_is_the_default() -> None:
    assert steps.dataset(None).name == "lumora-nest.csv"
    assert steps.dataset(None).is_file()
    held_out = steps.eval_dataset(None, None)
    assert held_out is not None
    assert held_out.name == "lumora-nest-eval.csv"
    assert held_out.is_file()
    assert steps.eval_dataset(None, Path("my.csv")) is None
    assert steps.eval_dataset(Path("other.csv"), None) == Path("other.csv").resolve()


def test_the_samples_held_out_rows_ask_for_facts_that_are_trained_on() -> None:
    held_out = steps.eval_dataset(None, None)
    assert held_out is not None
    with held_out.open() as asked, steps.dataset(None).open() as trained:
        questions = {row["instruction"]: row["response"] for row in csv.DictReader(trained)}
        rows = list(csv.DictReader(asked))
    assert len(rows) == 8
    assert all(row["response"] in questions.values() for row in rows)
    assert not any(row["instruction"] in questions for row in rows)


def test_any_field_can_be_set() -> None:
    fields = {"dataset": {"source": "a.csv"}}
    given = ["dataset.onInvalidRow=skip", "training.lora.r=4", "training.packing=false"]
    assert steps.with_settings(fields, given) == {
        "dataset": {"source": "a.csv", "on_invalid_row": "skip"},
        "training": {"lora": {"r": 4}, "packing": False},
    }
    for wrong in ("packing=false", "training.packing", "training.=1"):
        with pytest.raises(StageError, match=r"training\.packing=false"):
            steps.with_settings({}, [wrong])
