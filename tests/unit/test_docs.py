"""docs/training.md keeps up with the API: every field with its default."""

from __future__ import annotations

import json
import re
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from finetune_trainer.contract import Csv, Dataset, EarlyStopping, Lora, NoticeCode, Training

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
NESTED = {
    "columns": Dataset.model_fields["columns"].default.__class__,
    "csv": Csv,
    "lora": Lora,
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
    rows = re.findall(rf"^\| `{re.escape(path)}` \| (.*?) ?\| (.+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 1, f"{path} is not in a table of docs/training.md"
    assert rows[0][0] == written(FIELDS[path])


def test_the_page_names_no_field_that_is_not_there() -> None:
    named = re.findall(r"^\| `((?:dataset|training)\.[\w.]+)` \|", PAGE, re.MULTILINE)
    assert set(named) == set(FIELDS)


@pytest.mark.parametrize("code", list(NoticeCode))
def test_every_notice_is_explained(code: NoticeCode) -> None:
    assert re.search(rf"^\| `{code}` \| .+ \| .+ \|$", PAGE, re.MULTILINE)
