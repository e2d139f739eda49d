"""A training that has ended is not repeated, whoever starts it."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_trainer.contract import (
    Fingerprints,
    Notice,
    NoticeCode,
    PreparedRunConfig,
    Reason,
    Resolved,
    Stage,
    Storage,
    TrainingMetrics,
    TrainingRecord,
)
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import Folder, open_folder
from finetune_trainer.store.marker import METRICS, save_stage, stage_folder
from finetune_trainer.train.train_stage import run

RECORD = TrainingRecord(
    metrics=TrainingMetrics(train_loss=0.5, train_steps=45),
    hyperparameters={},
    notices=(Notice(code=NoticeCode.RESUMED, step=20, evidence="step 20", remedy="None."),),
)


@pytest.fixture
def output(tmp_path: Path) -> Folder:
    return open_folder(str(tmp_path / "store"), Storage())


def config(output: Folder) -> PreparedRunConfig:
    return PreparedRunConfig.model_validate(
        {
            "model": {"source": "org/base"},
            "dataset": {"source": "/data.csv"},
            "output": {"uri": output.uri_of("")},
            "resolved": Resolved(
                fingerprints=Fingerprints(prepare="a" * 64, train="b" * 64, export="c" * 64),
                dataset_etag="etag",
                dataset_rows=28,
                model_revision="d" * 40,
            ),
        }
    )


def trained(output: Folder, folder: Path, metrics: str) -> None:
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / METRICS).write_text(metrics)
    save_stage(output, Stage.TRAIN, "b" * 64, folder)


def test_it_says_that_the_store_holds_the_result_and_hands_on_its_figures(
    output: Folder, tmp_path: Path
) -> None:
    trained(output, tmp_path / "result", RECORD.model_dump_json())
    result = run(config(output), tmp_path, Reporter())
    assert result.reason is Reason.SUCCEEDED
    assert result.message.startswith("the store already holds the adapter: ")
    assert result.metrics == {"trainLoss": 0.5, "trainSteps": 45}
    assert result.notices == RECORD.notices


def test_figures_that_cannot_be_read_are_left_out(output: Folder, tmp_path: Path) -> None:
    trained(output, tmp_path / "result", "{}")
    result = run(config(output), tmp_path, Reporter())
    assert (result.reason, result.metrics) == (Reason.SUCCEEDED, {})


def test_a_result_that_is_not_whole_does_not_count(output: Folder, tmp_path: Path) -> None:
    trained(output, tmp_path / "result", RECORD.model_dump_json())
    output.delete([f"{stage_folder(Stage.TRAIN, 'b' * 64)}/adapter/adapter_model.safetensors"])
    with pytest.raises(Exception, match=r"examples\.jsonl|marker|complete"):
        run(config(output), tmp_path, Reporter())
