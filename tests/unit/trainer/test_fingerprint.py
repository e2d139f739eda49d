"""What reruns a stage, and what does not."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_trainer.contract import RunConfig
from finetune_trainer.contract.fingerprint import canonical, fingerprints

BASE: dict[str, Any] = {
    "model": {"source": "org/name"},
    "dataset": {"source": "s3://data/train.csv"},
    "output": {"uri": "s3://models/run"},
}


def prints(etag: str = "e1", revision: str = "r1", **changes: Any) -> dict[str, str]:
    config = RunConfig.model_validate({**BASE, **changes})
    return fingerprints(config, etag, revision).model_dump()


@pytest.mark.parametrize(
    ("what", "changed", "stages"),
    [
        ("nothing", {}, set()),
        ("the defaults, spelled out", {"training": {"epochs": 3}}, set()),
        ("the data", {"etag": "e2"}, {"prepare", "train", "export"}),
        ("the model's commit", {"revision": "r2"}, {"prepare", "train", "export"}),
        (
            "another column",
            {"dataset": {"source": "s3://data/train.csv", "columns": {"response": "answer"}}},
            {"prepare", "train", "export"},
        ),
        ("the length", {"training": {"maxSequenceLength": 512}}, {"prepare", "train", "export"}),
        ("the learning rate", {"training": {"learningRate": 1e-3}}, {"train", "export"}),
        (
            "the seed, which also chooses the held-out rows",
            {"training": {"seed": 1}},
            {"prepare", "train", "export"},
        ),
        ("the engine", {"training": {"engine": "unsloth"}}, {"train", "export"}),
        ("how often is saved", {"training": {"checkpointSteps": 5}}, set()),
        ("the GPU's memory", {"training": {"gpuMemory": "24Gi"}}, set()),
        ("a tracker", {"training": {"reportTo": ["wandb"]}}, set()),
        ("another quantization", {"export": {"gguf": ["Q6_K"]}}, {"export"}),
        ("no merged model", {"export": {"merged": False}}, {"export"}),
        ("the order of quantizations", {"export": {"gguf": ["Q4_K_M", "F16", "Q8_0"]}}, set()),
        ("how often is logged", {"training": {"loggingSteps": 1}}, set()),
        (
            "a branch with the same commit",
            {"model": {"source": "org/name", "revision": "b"}},
            set(),
        ),
        ("where it goes", {"output": {"uri": "s3://elsewhere/run"}}, set()),
        ("the store's address", {"storage": {"endpoint": "http://store:9000"}}, set()),
        (
            "the dataset's store",
            {"dataset": {"source": "s3://data/train.csv", "storage": {"region": "eu-west-1"}}},
            set(),
        ),
        (
            "the model's store",
            {"model": {"source": "org/name", "storage": {"endpoint": "http://store:9000"}}},
            set(),
        ),
        ("the job's name", {"job": {"name": "a", "namespace": "b"}}, set()),
    ],
)
def test_a_change_reaches_just_the_stages_that_it_touches(
    what: str, changed: dict[str, Any], stages: set[str]
) -> None:
    before, after = prints(), prints(**changed)
    assert {stage for stage in before if before[stage] != after[stage]} == stages, what


def test_the_seed_does_not_touch_held_out_rows_that_are_given() -> None:
    dataset = {**BASE["dataset"], "evalSource": "s3://data/held-out.csv"}
    before, after = prints(dataset=dataset), prints(dataset=dataset, training={"seed": 1})
    assert {stage for stage in before if before[stage] != after[stage]} == {"train", "export"}


def test_canonical_json_has_one_spelling() -> None:
    assert (
        canonical({"b": 1, "a": "ü"}) == canonical({"a": "ü", "b": 1}) == '{"a":"ü","b":1}'.encode()
    )
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical(float("nan"))


def test_fingerprints_stay_the_same_between_versions() -> None:
    """An upgrade must not retrain: when this fails, a recipe version should have been raised."""
    assert {stage: value[:12] for stage, value in prints().items()} == {
        "prepare": "73984f46f817",
        "train": "c769843dff36",
        "export": "6bc81b99cd8b",
    }
