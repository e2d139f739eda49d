"""The CustomResourceDefinition is structural, documented, and refuses what it should."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic import ValidationError

from finetune_operator.api import EnvVar, crd
from finetune_operator.api.finetunejob import FineTuneJobSpec
from finetune_trainer import contract

ROOT = Path(__file__).parents[2]


def schemas(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from schemas(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            yield from schemas(node[key], f"{path}[]")


@pytest.fixture(scope="module")
def root_schema() -> dict[str, Any]:
    version = crd.custom_resource_definition()["spec"]["versions"][0]
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    return schema


def test_is_valid_for_the_newest_kubernetes() -> None:
    kubernetes_validate.validate(crd.custom_resource_definition(), "1.37", strict=True)


def test_is_structural(root_schema: dict[str, Any]) -> None:
    for path, node in schemas(root_schema):
        assert not {"$ref", "anyOf", "oneOf", "allOf", "title", "const"} & node.keys(), path
        assert node.get("additionalProperties") is not False, path
        assert "null" not in str(node.get("type")), path
        typed = node.get("type") or node.get("x-kubernetes-int-or-string")
        assert typed, f"{path} has no type"


def test_every_field_is_documented(root_schema: dict[str, Any]) -> None:
    standard = {".apiVersion", ".kind", ".metadata"}
    bare = [
        path
        for path, node in schemas(root_schema)
        if path and not path.endswith("[]") and "description" not in node and path not in standard
    ]
    assert bare == []


def test_status_has_one_default_which_says_that_nobody_has_written_it(
    root_schema: dict[str, Any],
) -> None:
    status = root_schema["properties"]["status"]
    found = {path: node["default"] for path, node in schemas(status) if "default" in node}
    assert found == {"": {"observedGeneration": -1}}


def test_status_takes_the_words_of_a_newer_operator(root_schema: dict[str, Any]) -> None:
    """A phase that came later would make the API server refuse the whole status."""
    status = root_schema["properties"]["status"]
    assert [path for path, node in schemas(status) if "enum" in node] == []


def test_defaults_are_the_guides(root_schema: dict[str, Any]) -> None:
    training = root_schema["properties"]["spec"]["properties"]["training"]["properties"]
    defaults = {name: node["default"] for name, node in training.items() if "default" in node}
    del defaults["lora"], defaults["preference"]
    # It depends on the objective, so that the API server must not fill it in.
    assert "2e-4 for sft" in training["learningRate"]["description"]
    assert defaults == {
        "method": "lora",
        "objective": "sft",
        "epochs": 3,
        "batchSize": 2,
        "gradientAccumulationSteps": 4,
        "maxSequenceLength": 2048,
        "warmupRatio": 0.03,
        "scheduler": "linear",
        "weightDecay": 0.0,
        "packing": True,
        "gradientCheckpointing": "auto",
        "engine": "auto",
        "parallelism": "auto",
        "stallTimeout": "30m",
        "seed": 42,
        "loggingSteps": 10,
    }
    lora = training["lora"]["properties"]
    assert lora["r"]["default"] == 16
    assert lora["targetModules"]["default"] == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_a_rule_says_what_must_be(root_schema: dict[str, Any]) -> None:
    rules = [
        (path, rule["message"])
        for path, node in schemas(root_schema)
        for rule in node.get("x-kubernetes-validations", [])
    ]
    assert len(rules) >= 9
    assert [rule for rule in rules if not rule[1].startswith("must ")] == []


@pytest.mark.parametrize(
    ("given", "accepted"),
    [
        ({"value": "x"}, True),
        ({"value": ""}, True),
        ({"valueFrom": {"secretKeyRef": {"name": "wandb", "key": "key"}}}, True),
        ({}, False),
        ({"value": "x", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "key"}}}, False),
        ({"valueFrom": {}}, False),
        ({"valueFrom": {"secretKeyRef": {"name": "wandb"}}}, False),
        ({"valueFrom": {"configMapKeyRef": {"name": "wandb", "key": "key"}}}, False),
    ],
)
def test_a_variable_has_a_value_or_a_key_of_a_secret(given: dict[str, Any], accepted: bool) -> None:
    variable = {"name": "WANDB_API_KEY", **given}
    if accepted:
        assert EnvVar.model_validate(variable).model_dump(exclude_none=True)["name"]
    else:
        with pytest.raises(ValidationError):
            EnvVar.model_validate(variable)


def test_a_variable_with_two_values_is_refused_in_the_rules_words() -> None:
    spec = {
        "model": {"source": "org/base"},
        "dataset": {"source": "s3://data/faq.csv"},
        "output": {"uri": "s3://models/support"},
        "stages": {"train": {"env": [{"name": "A"}]}},
    }
    with pytest.raises(ValidationError) as refused:
        FineTuneJobSpec.model_validate(spec)
    words = contract.describe(refused.value, prefix="spec.")
    assert words.startswith("spec.stages.train.env.0: must have exactly one of value and valueFrom")


def test_strings_that_rules_look_at_are_bounded(root_schema: dict[str, Any]) -> None:
    """The API server estimates a rule's cost from maxLength and refuses what looks dear."""
    for path, node in schemas(root_schema):
        if "x-kubernetes-validations" in node and node.get("type") == "string":
            assert "maxLength" in node, path


def test_generated_files_are_fresh(tmp_path: Path) -> None:
    for folder in ("crds", "charts"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    crd.main(tmp_path)
    chart_copy = "charts/finetune-operator/files/finetunejob-crd.yaml"
    for file in ("crds/finetune.dev_finetunejobs.yaml", chart_copy):
        assert (tmp_path / file).read_text() == (ROOT / file).read_text(), "run `make generate`"


def test_example_is_what_the_types_accept() -> None:
    for file in sorted((ROOT / "examples").glob("finetunejob*.yaml")):
        document = yaml.safe_load(file.read_text())
        spec = FineTuneJobSpec.model_validate(document["spec"])
        run = spec.run_config(contract.JobReference(name="a", namespace="b"), None)
        assert run.training == spec.training
