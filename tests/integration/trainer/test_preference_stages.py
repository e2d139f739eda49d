"""Preferences to a GGUF file that passes the gate, by the command line, with report and card."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract import Reason, StageResult
from tests.integration.trainer.conftest import Trainer
from tests.integration.trainer.preferences import make_labelled, make_pairs

ROWS = 24


def write_pairs(folder: Path) -> Path:
    """OpenAI's preference format."""
    file = folder / "pairs.jsonl"
    rows = [
        {
            "input": {"messages": pair["prompt"]},
            "preferred_output": pair["completion"],
            "non_preferred_output": pair["rejected"],
        }
        for pair in make_pairs(ROWS)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_labelled(folder: Path) -> Path:
    """Answers that are good or bad, as CSV."""
    file = folder / "labelled.csv"
    with file.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(("prompt", "completion", "label"))
        for row in make_labelled(ROWS):
            said = (row[name][0]["content"] for name in ("prompt", "completion"))
            table.writerow((*said, str(row["label"]).lower()))
    return file


@pytest.fixture
def spec(run_config: dict[str, Any], tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    """A job on pairs, without its objective."""
    return run_config | {
        "model": {"source": str(tiny_model)},
        "dataset": {"source": str(write_pairs(tmp_path)), "evalFraction": 0.25},
        "training": {"learningRate": 0.005, "epochs": 1, "batchSize": 2},
        "export": {"gguf": ["F16"], "merged": False},
        "output": {"uri": str(tmp_path / "out")},
    }


def prepare_and_train(trainer: Trainer, config: dict[str, Any]) -> StageResult:
    """The training's result; `config` then has what was resolved."""
    prepared = trainer("prepare", config)
    assert prepared.result is not None, prepared.output
    assert prepared.result.resolved is not None, prepared.output
    assert prepared.result.resolved.dataset_rows == ROWS * 3 // 4
    config["resolved"] = prepared.result.resolved.model_dump(mode="json")
    trained = trainer("train", config)
    assert trained.result is not None, trained.output
    assert trained.code == 0, trained.output
    assert "reward accuracy" in trained.output
    assert "examples.jsonl: the tokens that prepare left are used" in trained.output
    return trained.result


def export(trainer: Trainer, config: dict[str, Any]) -> Path:
    """The version's folder; its file has been measured on held-out answers, and has passed."""
    exported = trainer("export", config)
    assert exported.result is not None, exported.output
    assert exported.code == 0, exported.output
    version = Path(config["output"]["uri"]) / "versions" / str(exported.result.version)
    gate = json.loads((version / "manifest.json").read_text())["gate"]
    assert gate["heldOut"]
    assert gate["tokens"] > 0
    assert len(gate["files"]) == 2
    for file in gate["files"]:  # the model's and the adapter's
        assert file["problems"] == []
        assert file["quality"]["passed"]
    return version


def test_preferences_go_through_all_stages(trainer: Trainer, spec: dict[str, Any]) -> None:
    refused = trainer("prepare", {**spec, "training": {}})
    assert refused.result is not None
    assert refused.result.reason is Reason.COLUMN_NOT_FOUND
    assert "set spec.training.objective to dpo" in refused.result.message

    spec["training"]["objective"] = "dpo"
    metrics = prepare_and_train(trainer, spec).metrics
    assert metrics["rewardAccuracy"] > metrics["baseRewardAccuracy"] == 0
    assert metrics["rewardMargin"] > metrics["baseRewardMargin"] == 0
    assert metrics["evalLoss"] < metrics["baseEvalLoss"]
    assert "perplexity" not in metrics

    version = export(trainer, spec)
    card = (version / "README.md").read_text()
    assert "Prefers the better answer in" in card
    assert "| Reward margin |" in card
    assert "\n- dpo\n" in card
    report = (version / "report.html").read_text()
    assert "pairs with the better answer preferred" in report
    assert "Reward accuracy" in report


@pytest.mark.parametrize("objective", ["orpo", "kto"])
def test_a_model_of_the_other_objectives_passes_the_gate(
    objective: str, trainer: Trainer, spec: dict[str, Any], tmp_path: Path
) -> None:
    spec["training"]["objective"] = objective
    if objective == "kto":
        spec["dataset"]["source"] = str(write_labelled(tmp_path))
    metrics = prepare_and_train(trainer, spec).metrics
    assert metrics["evalLoss"] < metrics["baseEvalLoss"]
    assert f"\n- {objective}\n" in (export(trainer, spec) / "README.md").read_text()
