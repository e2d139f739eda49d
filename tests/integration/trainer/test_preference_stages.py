"""OpenAI's preference format to a GGUF file, by the command line, with report and card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune_trainer.contract import Reason
from tests.integration.trainer.conftest import Trainer
from tests.integration.trainer.preferences import make_pairs


def test_preferences_go_through_all_stages(
    trainer: Trainer, run_config: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [
        {
            "input": {"messages": pair["prompt"]},
            "preferred_output": pair["completion"],
            "non_preferred_output": pair["rejected"],
        }
        for pair in make_pairs(24)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out"
    config = run_config | {
        "model": {"source": str(tiny_model)},
        "dataset": {"source": str(file), "evalFraction": 0.25},
        "training": {"objective": "dpo", "learningRate": 0.005, "epochs": 1, "batchSize": 2},
        "export": {"gguf": ["F16"], "merged": False, "adapterGguf": False},
        "output": {"uri": str(output)},
    }
    answers = {**config, "training": {}}
    refused = trainer("prepare", answers)
    assert refused.result is not None
    assert refused.result.reason is Reason.COLUMN_NOT_FOUND
    assert "set spec.training.objective to dpo" in refused.result.message

    prepared = trainer("prepare", config)
    assert prepared.result is not None, prepared.output
    assert prepared.result.resolved is not None, prepared.output
    assert prepared.result.resolved.dataset_rows == 18
    config["resolved"] = prepared.result.resolved.model_dump(mode="json")

    trained = trainer("train", config)
    assert trained.result is not None, trained.output
    assert trained.code == 0, trained.output
    metrics = trained.result.metrics
    assert metrics["rewardAccuracy"] > metrics["baseRewardAccuracy"] == 0
    assert metrics["rewardMargin"] > metrics["baseRewardMargin"] == 0
    assert metrics["evalLoss"] < metrics["baseEvalLoss"]
    assert "perplexity" not in metrics
    assert "reward accuracy" in trained.output
    assert "examples.jsonl: the tokens that prepare left are used" in trained.output

    exported = trainer("export", config)
    assert exported.result is not None, exported.output
    assert exported.code == 0, exported.output
    version = output / "versions" / str(exported.result.version)
    card = (version / "README.md").read_text()
    assert "Prefers the better answer in" in card
    assert "| Reward margin |" in card
    assert "\n- dpo\n" in card
    report = (version / "report.html").read_text()
    assert "pairs with the better answer preferred" in report
    assert "Reward accuracy" in report
