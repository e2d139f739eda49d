"""run.json: what is wrong with it is said by field."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from finetune_trainer.contract import RunConfig, Training, describe

GOOD: dict[str, Any] = {
    "model": {"source": "org/name"},
    "dataset": {"source": "s3://data/train.csv"},
    "output": {"uri": "s3://models/run"},
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"training": {"epochs": 0}},
            ["spec.training.epochs", "must be a whole number from 1 to 1000, or auto", "got 0"],
        ),
        ({"training": {"learningRate": "fast"}}, ["spec.training.learningRate", "got 'fast'"]),
        ({"training": {"epocs": 3}}, ["spec.training.epocs", "Extra inputs are not permitted"]),
        ({"training": {"lora": {"r": 0}}}, ["spec.training.lora.r", "greater than or equal to 1"]),
        ({"export": {"gguf": ["Q3_K"]}}, ["spec.export.gguf.0", "'Q4_K_M'", "got 'Q3_K'"]),
        ({"dataset": {}}, ["spec.dataset.source: Field required"]),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate({**GOOD, **change})
    text = describe(caught.value, prefix="spec.")
    assert "\n" not in text
    for part in said:
        assert part in text


def test_the_defaults_are_those_of_the_guide() -> None:
    training = RunConfig.model_validate(GOOD).training
    assert (training.lora.r, training.lora.alpha, training.epochs) == (16, 32, 3)
    assert (training.batch_size, training.gradient_accumulation_steps) == (2, 4)
    assert (training.learning_rate, training.warmup_ratio) == (2e-4, 0.03)
    assert (training.max_sequence_length, training.logging_steps) == (2048, 10)


@pytest.mark.parametrize(
    "more", [{"method": "full"}, {"initFrom": {"source": "/adapters/answers"}}]
)
@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_preferences_are_learnt_against_the_base_model(
    objective: str, more: dict[str, object]
) -> None:
    """Which is the model with its adapter off: there must be one, and it must begin at zero."""
    with pytest.raises(ValidationError, match="must have objective sft"):
        Training.model_validate({"objective": objective, **more})
    assert Training.model_validate({"objective": "sft", **more}).objective == "sft"
