"""`finetune plan` and `finetune run`, without a cluster."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from finetune_cli import rows
from finetune_cli.commands.plan import NEW, stages
from finetune_cli.commands.run import run_json
from finetune_cli.documents import Document, read_jobs
from finetune_cli.exits import ExitCode
from finetune_cli.job import Job
from finetune_cli.main import app
from finetune_trainer.contract import read_run_config

ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "tests" / "data" / "models" / "llama-3.2-1b.json"
SAMPLE = ROOT / "examples" / "data" / "lumora-nest.csv"
GPU = {"train": {"resources": {"limits": {"nvidia.com/gpu": 1}}}}
DONE = [{"name": each, "state": "Succeeded"} for each in ("prepare", "train", "export")]


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    """A job whose model and data are on this machine."""
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(CONFIG, model / "config.json")
    return {
        "model": {"source": str(model)},
        "dataset": {"source": str(SAMPLE)},
        "output": {"uri": "s3://models/support"},
        "stages": GPU,
    }


def written(folder: Path, spec: dict[str, Any]) -> Path:
    file = folder / "job.yaml"
    body = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob"}
    file.write_text(yaml.safe_dump({**body, "metadata": {"name": "support"}, "spec": spec}))
    return file


def document(folder: Path, spec: dict[str, Any]) -> Document:
    (found,) = read_jobs([written(folder, spec)])
    return found


def job(spec: dict[str, Any], **status: Any) -> Job:
    return Job({"metadata": {"name": "support"}, "spec": spec, "status": status})


def plan(folder: Path, spec: dict[str, Any], *flags: str) -> dict[str, Any]:
    command = ["plan", "--offline", "-o", "json", "-f", str(written(folder, spec)), *flags]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    told: dict[str, Any] = json.loads(found.stdout)
    return told


def test_a_new_job_is_predicted_with_its_rows(tmp_path: Path, spec: dict[str, Any]) -> None:
    told = plan(tmp_path, spec, "--gpu-memory", "16Gi")
    assert told["stages"] == dict.fromkeys(("prepare", "train", "export"), NEW)
    assert "of 16 GiB of the GPU" in told["needs"]["memory"]
    assert "GiB to train" in told["needs"]["disk"]
    assert "--tokens-per-second" in told["needs"]["time"]
    assert [line.partition(":")[0] for line in told["rows"]] == [
        f"row {n}, {part}" for n in (1, 2, 3) for part in ("instruction", "response")
    ]


def test_what_doesnt_fit_says_what_helps(tmp_path: Path, spec: dict[str, Any]) -> None:
    told = plan(tmp_path, spec, "--gpu-memory", "2Gi")["needs"]["memory"]
    assert told.startswith("doesn't fit: ")
    assert "Any of these would do: " in told


def test_time_and_price_by_a_speed(tmp_path: Path, spec: dict[str, Any]) -> None:
    spec["training"] = {"epochs": 4}
    flags = ("--tokens-per-second", "1", "--price-per-gpu-hour", "2")
    needs = plan(tmp_path, spec, *flags)["needs"]
    hours = SAMPLE.stat().st_size / rows.CHARACTERS_PER_TOKEN * 4 / 3600
    assert needs["price"] == f"about {2 * hours:.2f} for {hours:.2f} GPU-hours"


def test_a_model_and_data_that_cant_be_read_here(tmp_path: Path, spec: dict[str, Any]) -> None:
    spec["model"] = {"source": str(tmp_path / "none")}
    spec["dataset"] = {"source": "s3://data/*.parquet"}
    told = plan(tmp_path, spec)
    assert "on this machine" in told["needs"]["memory"]
    assert "no single file" in told["rows"][0]


def test_what_a_change_reruns(tmp_path: Path, spec: dict[str, Any]) -> None:
    before = job(spec, stages=DONE)

    def changed(**fields: Any) -> dict[str, str]:
        return stages(document(tmp_path, {**spec, **fields}), before)

    assert changed() == {
        "prepare": "has nothing to do",
        "train": "cached",
        "export": "cached",
    }
    trained = changed(training={"epochs": 5})
    assert trained["train"] == trained["export"] == "runs: training.epochs: 3 → 5"
    exported = changed(export={"gguf": ["Q8_0"]})
    assert exported["train"] == "cached"
    assert exported["export"].startswith("runs: export.gguf: ")
    assert changed(backoffLimit=5) == changed()
    moved = changed(dataset={"source": "s3://data/faq.csv"})
    assert moved["prepare"].startswith("looks again: dataset.source: ")
    assert moved["train"] == "cached, unless the examples come out as others"


def test_what_is_not_done_yet_runs(tmp_path: Path, spec: dict[str, Any]) -> None:
    half = job(spec, stages=[*DONE[:1], {"name": "train", "state": "Failed"}])
    told = stages(document(tmp_path, spec), half)
    assert told["train"] == told["export"] == "runs: it is not done yet"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "question;answer\nwhere?;here\n"),
        ("a.tsv", "question\tanswer\nwhere?\there\n"),
        ("a.jsonl", '{"question": "where?", "answer": "here"}\n{"question": "cut o'),
    ],
)
def test_rows_of_each_format(tmp_path: Path, spec: dict[str, Any], name: str, text: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    columns = {"instruction": "question", "response": "answer"}
    spec["dataset"] = {"source": str(file), "columns": columns}
    told = rows.first_rows(document(tmp_path, spec).spec(), None)
    assert told == ["row 1, instruction: where?", "row 1, response: here"]


@pytest.mark.parametrize(
    ("dataset", "text", "said"),
    [
        ({"csv": {"quote": "'"}}, "instruction,response\n'a, b',c\n", "row 1, instruction: a, b"),
        ({"csv": {"quote": ""}}, 'instruction,response\n"a,b\n', 'row 1, instruction: "a'),
        ({"csv": {"escape": "!"}}, "instruction,response\na!, b,c\n", "row 1, instruction: a, b"),
        ({}, f"instruction,response\n{'a' * 200_000},b\n", "row 1, instruction: aaa"),
        ({"encoding": "klingon"}, "instruction,response\na,b\n", "rows: not shown: unknown enc"),
    ],
)
def test_rows_as_the_spec_says(
    tmp_path: Path, spec: dict[str, Any], dataset: dict[str, Any], text: str, said: str
) -> None:
    file = tmp_path / "a.csv"
    file.write_text(text)
    encoding = dataset.get("encoding")
    spec["dataset"] = {"source": str(file)} | {k: v for k, v in dataset.items() if k == "csv"}
    made = document(tmp_path, spec).spec()
    changed = made.dataset.model_copy(update={"encoding": encoding})  # as a newer API may allow it
    assert rows.first_rows(made.model_copy(update={"dataset": changed}), None)[0].startswith(said)


def test_a_model_in_an_image_is_not_asked_of_the_hub(tmp_path: Path, spec: dict[str, Any]) -> None:
    spec["model"] = {"source": "oci://registry.example/base:1"}
    assert "is a container image" in plan(tmp_path, spec)["needs"]["memory"]


def test_a_size_that_is_no_quantity(tmp_path: Path, spec: dict[str, Any]) -> None:
    command = ["plan", "--offline", "-f", str(written(tmp_path, spec)), "--gpu-memory", "24GB"]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == ExitCode.USAGE
    assert "24Gi" in found.stderr


def test_a_run_here_is_told_what_the_operator_would_tell(
    tmp_path: Path, spec: dict[str, Any]
) -> None:
    spec |= {"training": {"epochs": 2}, "storage": {"secretRef": {"name": "keys"}}}
    file = tmp_path / "run.json"
    file.write_text(run_json(document(tmp_path, spec), tmp_path / "support"))
    config = read_run_config(file).value
    assert (config.job, config.training.epochs) == (None, 2)
    assert config.output.uri == str(tmp_path / "support")


def test_a_run_here_signs_nothing(
    tmp_path: Path, spec: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    spec["export"] = {"signing": {"keySecretRef": {"name": "key"}}}
    file = tmp_path / "run.json"
    file.write_text(run_json(document(tmp_path, spec), tmp_path / "support"))
    assert read_run_config(file).value.export.signing is None
    assert "nothing is signed here" in capsys.readouterr().err


def test_without_the_trainer_the_extra_is_named(
    tmp_path: Path, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = CliRunner().invoke(app, ["run", "-f", str(written(tmp_path, spec))])
    assert found.exit_code == ExitCode.FAILED
    assert "finetune-operator[cli,trainer,gguf]" in found.stderr
