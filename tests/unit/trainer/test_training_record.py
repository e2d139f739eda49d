"""metrics.json is read also where another version wrote it, and never with NaN in it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from finetune_trainer.contract import TrainingRecord

RECORD: dict[str, Any] = {
    "metrics": {"trainLoss": 1.5, "trainSteps": 30.0, "aFigureOfTomorrow": 1.0},
    "hyperparameters": {"epochs": 3, "lora": {"r": 16}},
    "notices": [],
    "history": [{"step": 10.0, "epoch": 1.0, "loss": 1.9, "learning_rate": 2e-4, "more": 1}],
    "aFieldOfTomorrow": {},
}


def test_what_another_version_added_is_left_out() -> None:
    record = TrainingRecord.model_validate_json(json.dumps(RECORD))

    assert record.metrics.named() == {"trainLoss": 1.5, "trainSteps": 30.0}
    assert record.history[0].model_dump(exclude_none=True) == {
        "step": 10,
        "epoch": 1.0,
        "loss": 1.9,
        "learning_rate": 2e-4,
    }
    assert record.hyperparameters == RECORD["hyperparameters"]


def test_it_is_written_as_it_was_read() -> None:
    record = TrainingRecord.model_validate(RECORD)

    written = record.model_dump_json(indent=2, exclude_none=True)

    assert TrainingRecord.model_validate_json(written) == record
    assert '"learning_rate": 0.0002' in written, "by the Trainer's own names"


@pytest.mark.parametrize("value", ["NaN", "Infinity"])
def test_a_figure_that_is_no_number_is_refused(value: str) -> None:
    text = json.dumps(RECORD).replace("1.5", value)

    with pytest.raises(ValidationError, match="trainLoss"):
        TrainingRecord.model_validate_json(text)
