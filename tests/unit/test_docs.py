"""docs/training.md and docs/data.md keep up with the API: every field with its default."""

from __future__ import annotations

import json
import re
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from finetune_trainer.contract import (
    Csv,
    Dataset,
    EarlyStopping,
    Lora,
    NoticeCode,
    Objective,
    Preference,
    Training,
)
from finetune_trainer.prepare.reading import Problems, open_shards
from tests.reading import read_records

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "training.md").read_text(encoding="utf-8")
DATA = (DOCS / "data.md").read_text(encoding="utf-8")
NESTED = {
    "columns": Dataset.model_fields["columns"].default.__class__,
    "csv": Csv,
    "lora": Lora,
    "preference": Preference,
}


def fields(kind: type[BaseModel], prefix: str) -> dict[str, Any]:
    """Default by path, for the fields below a type."""
    found: dict[str, Any] = {}
    for field in kind.model_fields.values():
        path = f"{prefix}.{field.alias}"
        nested = NESTED.get(str(field.alias))
        if nested is not None:
            found |= fields(nested, path)
        elif field.alias == "earlyStopping":
            found |= fields(EarlyStopping, path)
        else:
            found[path] = field.default
    return found


FIELDS = fields(Dataset, "dataset") | fields(Training, "training")


def written(default: Any) -> str:
    """A default as the page spells it."""
    if default is PydanticUndefined:
        return ""
    if default is None:
        return "none"
    if isinstance(default, tuple):
        return f"`[{', '.join(default)}]`"
    if isinstance(default, StrEnum | str):
        return f"`{default}`"
    if isinstance(default, float) and 0 < default < 1e-3:
        return f"`{default:.0e}`".replace("e-0", "e-")
    return f"`{json.dumps(default)}`"


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_is_explained_with_its_default(path: str) -> None:
    page, name = (DATA, "data.md") if path.startswith("dataset.") else (PAGE, "training.md")
    rows = re.findall(rf"^\| `{re.escape(path)}` \| (.*?) ?\| (.+) \|$", page, re.MULTILINE)
    assert len(rows) == 1, f"{path} is not in a table of docs/{name}"
    assert rows[0][0] == written(FIELDS[path])


def test_the_pages_name_no_field_that_is_not_there() -> None:
    named = re.findall(r"^\| `((?:dataset|training)\.[\w.]+)` \|", PAGE + DATA, re.MULTILINE)
    assert sorted(named) == sorted(FIELDS)


SAMPLES = re.findall(r"^```(?:csv|json)\n(.+?)^```$", DATA, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample[:30])
def test_each_sample_is_read_without_a_mapping(sample: str, tmp_path: Path) -> None:
    if sample.startswith('{"tools"'):  # on several lines for the eye
        sample = json.dumps(json.loads(sample))
    file = tmp_path / "sample"
    file.write_text(sample, encoding="utf-8")
    records = list(read_records(file, Dataset(source=str(file)), str(file), Problems()))
    assert records
    learnt = {"document" if sample.startswith('{"text"') else "assistant"}
    assert {record.messages[-1]["role"] for record in records} == learnt


PREFERENCES = re.findall(r"^```(?:csv|json) preference\n(.+?)^```$", DATA, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("sample", PREFERENCES, ids=lambda sample: sample[:30])
def test_each_sample_of_preferences_is_read_without_a_mapping(sample: str, tmp_path: Path) -> None:
    file = tmp_path / "sample"
    file.write_text(sample, encoding="utf-8")
    objective: Objective = "kto" if "label" in sample else "dpo"
    dataset = Dataset(source=str(file))
    source = open_shards([(file, str(file))], dataset, str(file), objective)
    records = list(source.records(Problems()))
    assert records
    assert all(each.rejected is not None or each.label is not None for each in records)


DATASETS = re.findall(r"^```yaml\n(.+?)^```$", DATA, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("sample", DATASETS)
def test_each_dataset_is_a_valid_one(sample: str) -> None:
    for part in re.split(r"^(?=dataset:)", sample, flags=re.MULTILINE)[1:]:
        Dataset.model_validate(yaml.safe_load(part)["dataset"])


@pytest.mark.parametrize("code", list(NoticeCode))
def test_every_notice_is_explained(code: NoticeCode) -> None:
    assert re.search(rf"^\| `{code}` \| .+ \| .+ \|$", PAGE, re.MULTILINE)
