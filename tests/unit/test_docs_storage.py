"""docs/storage.md keeps up with the API."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from finetune_operator.api.finetunejob import DatasetStorageSpec, StorageSpec
from finetune_trainer.contract.output import CREDENTIALS

PAGE = (Path(__file__).parents[2] / "docs" / "storage.md").read_text(encoding="utf-8")


def test_every_field_is_explained_and_no_other() -> None:
    table = PAGE.partition("| `spec.storage` |")[2].partition("\n\n")[0]
    named = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(named) == sorted(str(each.alias) for each in StorageSpec.model_fields.values())


@pytest.mark.parametrize("name", CREDENTIALS)
def test_every_key_of_the_secret_is_named(name: str) -> None:
    assert name in PAGE


def test_the_examples_are_what_the_api_takes() -> None:
    for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL):
        spec = yaml.safe_load(text)["spec"]
        if "storage" in spec:
            StorageSpec.model_validate(spec["storage"])
        if "dataset" in spec:
            DatasetStorageSpec.model_validate(spec["dataset"]["storage"])


def test_the_policy_names_what_the_trainer_asks_for() -> None:
    (text,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    allowed = {action for each in json.loads(text)["Statement"] for action in each["Action"]}
    assert allowed == {
        f"s3:{name}"
        for name in (
            "AbortMultipartUpload",
            "DeleteObject",
            "GetObject",
            "ListBucket",
            "ListBucketMultipartUploads",
            "PutObject",
        )
    }
