"""What reruns a stage, and what does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_trainer.contract import ExampleContents, RunConfig, Training
from finetune_trainer.contract.fingerprint import canonical, later_fingerprints, prepare_fingerprint

BASE: dict[str, Any] = {
    "model": {"source": "org/name"},
    "dataset": {"source": "s3://data/train.csv"},
    "output": {"uri": "s3://models/run"},
}
EXAMPLES = ExampleContents(examples="a" * 64, held_out="b" * 64, cut=False, longest=400)


def prints(
    etag: str = "e1",
    revision: str = "r1",
    examples: ExampleContents = EXAMPLES,
    initial: str | None = None,
    **changes: Any,
) -> dict[str, str]:
    config = RunConfig.model_validate({**BASE, **changes})
    prepare = prepare_fingerprint(config, etag, revision)
    found: dict[str, str] = later_fingerprints(
        config, prepare, examples, revision, initial
    ).model_dump()
    return found


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {stage for stage in before if before[stage] != after[stage]}


ALL, LATER = {"prepare", "train", "export"}, {"train", "export"}


@pytest.mark.parametrize(
    ("what", "change", "stages"),
    [
        ("nothing", {}, set()),
        ("the defaults, spelled out", {"training": {"epochs": 3}}, set()),
        ("another file with the same examples", {"etag": "e2"}, {"prepare"}),
        ("other examples", {"examples": replace(EXAMPLES, examples="c" * 64)}, LATER),
        ("other held-out rows", {"examples": replace(EXAMPLES, held_out="c" * 64)}, LATER),
        ("no held-out rows", {"examples": replace(EXAMPLES, held_out=None)}, LATER),
        ("the model's files", {"revision": "r2"}, ALL),
        (
            "a column that says the same",
            {"dataset": {"source": "s3://data/train.csv", "columns": {"input": "input"}}},
            {"prepare"},
        ),
        ("the method", {"training": {"method": "full"}}, LATER),
        ("the learning rate", {"training": {"learningRate": 1e-3}}, LATER),
        ("the objective", {"training": {"objective": "dpo"}}, ALL),
        ("what answers don't read", {"training": {"preference": {"beta": 0.5}}}, set()),
        ("the seed, which also holds out", {"training": {"seed": 1}}, ALL),
        ("the engine", {"training": {"engine": "unsloth"}}, LATER),
        ("the effective batch", {"training": {"batchSize": 4}}, LATER),
        (
            "how a step is split",
            {"training": {"batchSize": 4, "gradientAccumulationSteps": 2}},
            set(),
        ),
        ("packing", {"training": {"packing": False}}, set()),
        ("how often is evaluated", {"training": {"evalSteps": 5}}, set()),
        ("how often is saved", {"training": {"checkpointSteps": 5}}, set()),
        ("the GPU's memory", {"training": {"gpuMemory": "24Gi"}}, set()),
        ("a tracker", {"training": {"reportTo": ["wandb"]}}, set()),
        ("how often is logged", {"training": {"loggingSteps": 1}}, set()),
        (
            "the order of layers",
            {"training": {"lora": {"targetModules": ["o_proj", "v_proj", "k_proj", "q_proj"]}}},
            set(),
        ),
        ("layers by other names", {"training": {"lora": {"targetModules": ["q_a_proj"]}}}, LATER),
        ("other layers", {"training": {"lora": {"targetModules": ["q_proj"]}}}, LATER),
        ("another quantization", {"export": {"gguf": ["Q6_K"]}}, {"export"}),
        ("no merged model", {"export": {"merged": False}}, {"export"}),
        ("the order of quantizations", {"export": {"gguf": ["Q4_K_M", "F16", "Q8_0"]}}, set()),
        (
            "a branch with the same files",
            {"model": {"source": "org/name", "revision": "b"}},
            set(),
        ),
        ("where it goes", {"output": {"uri": "s3://elsewhere/run"}}, set()),
        (
            "how many versions are kept, and whose folder it was",
            {"output": {"uri": "s3://models/run", "keepVersions": 1, "takeOverFrom": "a/b"}},
            set(),
        ),
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
    what: str, change: dict[str, Any], stages: set[str]
) -> None:
    assert changed(prints(), prints(**change)) == stages, what


@pytest.mark.parametrize(
    ("what", "cut", "stages"),
    [("no row is cut", False, {"prepare", "export"}), ("rows are cut", True, ALL)],
)
def test_the_length_matters_to_a_training_only_where_it_cuts(
    what: str, cut: bool, stages: set[str]
) -> None:
    """The Modelfile names it in any case."""
    examples = replace(EXAMPLES, cut=cut)
    before = prints(examples=examples)
    after = prints(examples=examples, training={"maxSequenceLength": 512})
    assert changed(before, after) == stages, what


def test_evaluations_matter_where_the_best_of_them_is_kept() -> None:
    stopping: dict[str, Any] = {"earlyStopping": {}}
    after = prints(training={**stopping, "evalSteps": 5})
    assert changed(prints(training=stopping), after) == LATER


@pytest.mark.parametrize(("longest", "stages"), [(256, set()), (257, LATER)])
def test_a_shortest_length_matters_where_examples_are_longer(
    longest: int, stages: set[str]
) -> None:
    examples = replace(EXAMPLES, longest=longest)
    floor = {"minSequenceLength": 256}
    assert changed(prints(examples=examples), prints(examples=examples, training=floor)) == stages
    more = {**BASE["dataset"], "maxTruncatedRows": "20%"}
    before = prints(examples=examples, training=floor)
    after = prints(examples=examples, training=floor, dataset=more)
    assert changed(before, after) == {"prepare", *stages}, "as many rows as that may be cut"


@pytest.mark.parametrize(
    ("objective", "preference", "stages"),
    [
        ("dpo", {"beta": 0.5}, LATER),
        ("dpo", {"lossType": "ipo"}, LATER),
        ("dpo", {"desirableWeight": 2}, set()),
        ("orpo", {"lossType": "ipo"}, set()),
        ("kto", {"desirableWeight": 2}, LATER),
        ("kto", {"beta": 0.1}, set()),
    ],
)
def test_an_objective_counts_what_it_reads(
    objective: str, preference: dict[str, Any], stages: set[str]
) -> None:
    before = prints(training={"objective": objective})
    after = prints(training={"objective": objective, "preference": preference})
    assert changed(before, after) == stages


@pytest.mark.parametrize(
    ("training", "rate"),
    [
        ({}, 2e-4),
        ({"objective": "dpo"}, 5e-6),
        ({"objective": "kto"}, 5e-6),
        ({"objective": "orpo"}, 8e-5),
        ({"objective": "dpo", "learningRate": 1e-5}, 1e-5),
    ],
)
def test_the_learning_rate_left_out_is_that_of_the_objective(
    training: dict[str, Any], rate: float
) -> None:
    assert Training.model_validate(training).learning_rate == rate


def test_the_order_of_quality_limits_does_not_matter() -> None:
    limits = [
        {"quantization": "Q8_0", "maxKLDivergence": 0.1},
        {"quantization": "Q4_K_M", "maxKLDivergence": 0.2},
    ]
    before = prints(export={"qualityLimits": limits})
    assert changed(before, prints(export={"qualityLimits": limits[::-1]})) == set()
    assert changed(before, prints(export={"qualityLimits": limits[:1]})) == {"export"}


def test_what_the_modelfile_says_is_exported_again() -> None:
    """Where all rows bring a system prompt of their own, the examples stay the same."""
    dataset = {**BASE["dataset"], "systemPrompt": "Be a kettle."}
    assert changed(prints(), prints(dataset=dataset)) == {"prepare", "export"}
    renamed = prints(model={"source": "org/other"})
    assert changed(prints(), renamed) == {"prepare", "export"}, "files bear its name"


def test_the_seed_does_not_touch_held_out_rows_that_are_given() -> None:
    dataset = {**BASE["dataset"], "evalSource": "s3://data/held-out.csv"}
    before, after = prints(dataset=dataset), prints(dataset=dataset, training={"seed": 1})
    assert changed(before, after) == LATER


def test_canonical_json_has_one_spelling() -> None:
    assert (
        canonical({"b": 1, "a": "ü"}) == canonical({"a": "ü", "b": 1}) == '{"a":"ü","b":1}'.encode()
    )
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical(float("nan"))


def test_fingerprints_stay_the_same_between_versions() -> None:
    """An upgrade must not retrain: when this fails, a recipe version should have been raised."""
    assert {stage: value[:12] for stage, value in prints().items()} == {
        "prepare": "a61729036858",
        "train": "aa37a2e6e514",
        "export": "a20a2f6ce768",
    }


def test_the_order_of_layers_with_other_names_does_not_matter() -> None:
    names = ["q_b_proj", "o_proj", "q_a_proj"]
    before = prints(training={"lora": {"targetModules": names}})
    assert changed(before, prints(training={"lora": {"targetModules": names[::-1]}})) == set()
    assert changed(before, prints(training={"lora": {"targetModules": names[:2]}})) == LATER


def test_an_adapter_to_go_on_from_counts_by_what_is_in_it() -> None:
    def from_adapter(source: str, initial: str) -> dict[str, str]:
        return prints(initial=initial, training={"initFrom": {"source": source}})

    before = from_adapter("/versions/a/adapter", "sha256:a")
    assert changed(prints(), before) == LATER
    assert changed(before, from_adapter("org/adapter", "sha256:a")) == set()
    assert changed(before, from_adapter("/versions/a/adapter", "sha256:b")) == LATER
