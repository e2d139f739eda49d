"""The YAML, the settings and the fields that the documentation shows are what the code takes."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from finetune_operator.api.crd import custom_resource_definition
from finetune_operator.api.finetunejob import FineTuneJobSpec
from finetune_trainer.local.fields import apply_settings
from hack import REPOSITORY
from tests.commands import PAGES

YAML = re.compile(r"^```yaml\n(.+?)^```$", re.MULTILINE | re.DOTALL)
CHART = REPOSITORY / "charts" / "finetune-operator"
VALUES = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
LEAST: dict[str, Any] = {
    "model": {"source": "org/name"},
    "dataset": {"source": "s3://data/rows.csv"},
    "output": {"uri": "s3://models/name"},
}
ROOT = custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def documents(page: Path) -> list[dict[str, Any]]:
    """The documents of a page's YAML. A block may show a part of a spec several times over."""
    found: list[dict[str, Any]] = []
    for block in YAML.findall(page.read_text(encoding="utf-8")):
        parts = [block] if "kind:" in block else re.split(r"(?m)^(?=spec:\n)", block)
        for part in parts:
            found += filter(None, yaml.safe_load_all(part))
    return found


def merged(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    found = deepcopy(left)
    for key, value in right.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = merged(found[key], value) if both else value
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_each_spec_is_what_the_api_takes(page: Path) -> None:
    for document in documents(page):
        if document.get("kind") == "FineTuneJob":
            FineTuneJobSpec.model_validate(document["spec"])
        elif set(document) == {"spec"}:
            FineTuneJobSpec.model_validate(merged(LEAST, document["spec"]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_each_value_is_what_the_chart_takes(page: Path) -> None:
    for document in documents(page):
        if set(document) <= set(VALUES["properties"]):
            jsonschema.validate(document, VALUES)


def test_there_are_specs_and_values_to_look_at() -> None:
    known = [document for page in PAGES for document in documents(page)]
    assert sum(set(each) == {"spec"} for each in known) > 8
    assert sum(set(each) <= set(VALUES["properties"]) for each in known) > 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_each_setting_of_a_local_command_is_a_field_with_such_a_value(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for setting in re.findall(r"--set ((?:training|dataset|export|model)\.[\w.]+=[^\s'`]+)", text):
        if not setting.endswith("…"):
            FineTuneJobSpec.model_validate(merged(LEAST, apply_settings({}, [setting])))


def is_field(path: str) -> bool:
    """Whether a path such as spec.stages.<stage>.env[].name leads to a field."""
    schema = ROOT
    for part in re.sub(r"\[\d*\*?\]", "", path).split("."):
        schema = schema.get("items", schema)
        extra = schema.get("additionalProperties")
        fields = schema.get("properties", {})
        if part in fields:
            schema = fields[part]
        elif part in ("*", "<stage>") and fields:
            schema = next(iter(fields.values()))
        elif isinstance(extra, dict):
            schema = extra
        else:
            return bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_each_field_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:spec|status)\.[\w.*<>\[\]]+\w)(?=[`:=])", text)
    assert [path for path in named if not is_field(path)] == []
