"""One machine without Kubernetes: what `make train`, `make merge` and `make gguf` call."""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_trainer.contract import Stage, StageError
from finetune_trainer.local import SAMPLE, SAMPLE_EVAL, _done, run_config
from tests.integration.trainer.conftest import ATTENTION, MLP, Trainer, write_csv


class Local:
    """The command, in a folder of its own."""

    def __init__(self, trainer: Trainer) -> None:
        self.environment = trainer.full_environment
        self.processes = trainer.processes
        self.folder = trainer.folder

    def __call__(self, *arguments: str, code: int = 0) -> str:
        with self.processes.popen(
            [sys.executable, "-m", "finetune_trainer", "local", *arguments],
            env=self.environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            output = "".join(process.communicate(timeout=300))
        assert process.returncode == code, output
        assert "Traceback" not in output
        return output

    def files(self, name: str) -> set[str]:
        return {path.name for path in (self.folder / "models" / name).iterdir()}


@pytest.fixture
def local(trainer: Trainer) -> Local:
    return Local(trainer)


def test_train_merge_and_convert(local: Local, tiny_model: Path) -> None:
    local.processes.real = True
    write_csv(local.folder / "my.csv")
    train = [
        "train",
        "--dataset=my.csv",
        f"--base-model={tiny_model}",
        "--epochs=40",
        "--set=training.learningRate=0.005",
        "--set=training.gradientAccumulationSteps=1",
        "--set=training.lora.r=32",
        "--set=training.lora.dropout=0",
        f"--set=training.lora.targetModules={','.join((*ATTENTION, *MLP))}",
    ]
    output = local(*train)
    for said in (
        "Device: CPU, 1 thread",
        f"Model: {tiny_model} (lora)",
        "Trainable parameters / base parameters: 65,536 / 3,219,776 (2.0354%)",
        "Training examples: 6, epochs: 40",
        "step 10/120  epoch 3.33  loss ",
        "learning rate ",
        "Next: `finetune-trainer local merge` (`make merge`)",
    ):
        assert said in output
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= local.files("lora_adapter")

    assert "Next: `finetune-trainer local gguf` (`make gguf`)" in local("merge")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= local.files("merged")

    output = local("gguf", "--gguf=Q8_0,Q4_K_M")
    assert "Next: look at " in output
    assert "tiny-Q4_K_M.gguf" in (local.folder / "models" / "README.md").read_text()
    report = (local.folder / "models" / "report.html").read_text()
    assert all(said in report for said in ("tiny-Q8_0.gguf", 'id="loss-wide', "my.csv"))
    assert local.files("gguf") == {"tiny-Q8_0.gguf", "tiny-Q4_K_M.gguf"}
    modelfile = (local.folder / "models" / "Modelfile").read_text()
    assert "FROM ./gguf/tiny-Q8_0.gguf\n" in modelfile
    assert 'TEMPLATE """{{ if .System }}<|im_start|>system\n' in modelfile
    rows = [line for line in output.splitlines() if line.strip().endswith("✓ passed")]
    assert [row.split()[0] for row in rows] == ["tiny-Q8_0.gguf", "tiny-Q4_K_M.gguf"]

    local.processes.real = False  # no process does anything else than before from here on
    assert "its result is taken as it is" in local(*train)
    limits = [{"quantization": "Q4_K_M", "maxKLDivergence": 1e-9}]
    local(*train, f"--set=export.qualityLimits={json.dumps(limits)}")
    output = local("gguf", "--set=export.gguf=Q4_K_M", code=15)
    assert "1 of 1 GGUF files falls short and is kept apart in rejected/" in output
    assert local.files("rejected") == {"tiny-Q4_K_M.gguf"}
    assert local.files("gguf") == set()
    assert "Modelfile" not in local.files("."), "the former one names files that are gone"


def test_the_next_command_can_be_pasted() -> None:
    folder = Path("/a b/models")
    said = _done(Stage.TRAIN, "the adapter is there", "merge", folder).message
    command, make = re.findall("`(.*?)`", said)
    assert shlex.split(command)[3:] == ["--output", str(folder)]
    assert shlex.split(make) == ["make", "merge", f"OUTPUT={folder}"]


def test_a_machine_that_is_too_small_is_told_in_its_own_words(
    local: Local, tiny_model: Path
) -> None:
    write_csv(local.folder / "my.csv")
    given = ["train", "--dataset=my.csv", f"--base-model={tiny_model}"]
    said = local(*given, "--set=hardware.ephemeralStorageBytes=1000000", code=13)
    assert "and there are 1 MiB: free at least " in said


def test_so_it_is_where_run_json_is_of_no_job(
    trainer: Trainer, tiny_model: Path, tmp_path: Path
) -> None:
    """As `finetune run` writes it."""
    write_csv(tmp_path / "my.csv")
    settings = [f"dataset.source={tmp_path / 'my.csv'}", f"model.source={tiny_model}"]
    config = run_config([*settings, "hardware.ephemeralStorageBytes=1000000"], tmp_path)
    (tmp_path / "run.json").write_text(config.model_dump_json())
    command = [sys.executable, "-m", "finetune_trainer", "run", "--config=run.json"]
    done = subprocess.run(
        command,
        env=trainer.full_environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 13
    assert "and there are 1 MiB: free at least " in done.stdout + done.stderr


def test_what_comes_first_is_said(local: Local) -> None:
    assert "run `make train` first" in local("merge", code=11)
    assert "run `make train` first" in local("gguf", code=11)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--dataset=none.csv", "--base-model=a/b"], 10, "There is no dataset at "),
        (["--epochs=0", "--base-model=a/b"], 11, "--epochs: must be a whole number"),
        (
            ["--set=training.engine=best", "--base-model=a/b"],
            11,
            "training.engine: Input should be",
        ),
        (
            ["--learning-rate=2", "--base-model=a/b"],
            11,
            "--learning-rate: Input should be",
        ),
        (
            ["--set=training.learningrate=1e-3", "--base-model=a/b"],
            11,
            "the nearest is --set training.learningRate",
        ),
        (["--set=training.epochs=x", "--base-model=a/b"], 11, "--set training.epochs: Input"),
        (
            ["--set=dataset.columns.text=a", "--set=dataset.columns.prompt=a"],
            11,
            " dataset.columns",
        ),
    ],
)
def test_bad_arguments(local: Local, arguments: list[str], code: int, said: str) -> None:
    assert said in local("train", *arguments, code=code)


def test_the_sample_dataset_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    sample = run_config(["model.source=a/b"], tmp_path).dataset
    assert Path(sample.source).name == "lumora-nest.csv"
    assert Path(sample.source).is_file()
    assert sample.eval_source is not None
    assert Path(sample.eval_source).name == "lumora-nest-eval.csv"
    assert Path(sample.eval_source).is_file()

    given = ["model.source=a/b", "dataset.source=my.csv"]
    own = run_config(given, tmp_path).dataset
    assert own.source == str(tmp_path / "my.csv")
    assert own.eval_source is None
    both = run_config([*given, "dataset.evalSource=other.csv"], tmp_path).dataset
    assert both.eval_source == str(tmp_path / "other.csv")


def test_a_dataset_that_is_not_there_is_told_before_a_model_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[str] = []

    def model() -> str:
        made.append("a/b")
        return made[0]

    monkeypatch.setattr("finetune_trainer.local.make_base_model", model)
    with pytest.raises(StageError, match="There is no dataset at "):
        run_config([f"dataset.source={tmp_path / 'none.csv'}"], tmp_path)
    assert not made
    write_csv(tmp_path / "my.csv")
    assert run_config([f"dataset.source={tmp_path / 'my.csv'}"], tmp_path).model.source == "a/b"
    assert made


def test_the_samples_held_out_rows_ask_for_facts_that_are_trained_on() -> None:
    with SAMPLE_EVAL.open() as asked, SAMPLE.open() as trained:
        questions = {row["instruction"]: row["response"] for row in csv.DictReader(trained)}
        rows = list(csv.DictReader(asked))
    assert len(rows) == 8
    assert all(row["response"] in questions.values() for row in rows)
    assert not any(row["instruction"] in questions for row in rows)


def test_the_fields_are_listed_with_what_they_mean(local: Local) -> None:
    listed = local("fields").splitlines()
    assert listed[listed.index("training.learningRate=0.0002") + 1].strip().startswith("Peak")
    assert "training.lora.targetModules=q_proj,k_proj,v_proj,o_proj" in listed
    assert "training.earlyStopping.patience=2" in listed
    assert "training.packing=true" in listed
    assert "PATH=VALUE" in local("train", "--help")
