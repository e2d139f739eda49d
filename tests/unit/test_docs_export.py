"""docs/export.md keeps up with the API, and its YAML is what it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_trainer.contract import Export, Quality, QualityLimit, Quantization
from tests.unit.test_docs import fields, written

FOLDER = Path(__file__).parents[2] / "docs"
PAGE = (FOLDER / "export.md").read_text(encoding="utf-8")
FIELDS = fields(Export, "export") | fields(QualityLimit, "export.qualityLimits")


def blocks(language: str) -> list[str]:
    """The fenced blocks of the page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def objects() -> Iterator[dict[str, Any]]:
    for block in blocks("yaml"):
        yield from yaml.safe_load_all(block)


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_is_explained_with_its_default(path: str) -> None:
    rows = re.findall(rf"^\| `{re.escape(path)}` \| (.*?) ?\| (.+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 1, f"{path} is not in a table of docs/export.md"
    assert rows[0][0] == written(FIELDS[path])


def test_the_page_names_no_field_that_is_not_there() -> None:
    named = re.findall(r"^\| `(export\.[\w.]+)` \|", PAGE, re.MULTILINE)
    assert set(named) == set(FIELDS)


def test_every_type_is_weighed_against_the_others() -> None:
    rows = re.findall(r"^\| (`[A-Z].*?) \| .+ GiB \|", PAGE, re.MULTILINE)
    named = re.findall(r"`(\w+)`", " ".join(rows))
    assert named == list(Quantization)


def test_the_examples_of_a_spec_are_valid() -> None:
    (spec,) = (each["spec"]["export"] for each in objects() if "kind" not in each)
    export = Export.model_validate(spec)
    assert [limit.quantization for limit in export.quality_limits] == [Quantization.Q4_K_M]


def test_the_command_that_shows_the_quality_names_fields_that_exist() -> None:
    (command,) = re.findall(r"^\$ kubectl get ftj .+$", PAGE, re.MULTILINE)
    known = {field.alias for field in Quality.model_fields.values()}
    named = set(re.findall(r"\.quality\.(\w+)", command))
    assert named
    assert named <= known


def test_kserve_reads_folders_of_the_output() -> None:
    services = [each for each in objects() if each.get("kind") == "InferenceService"]
    assert len(services) == 2
    text = "".join(blocks("yaml"))
    found = re.findall(r"s3://models/support-bot/versions/[0-9a-f]{12}/(\w+)", text)
    assert sorted(found) == ["adapter", "merged"], "of a version, whose files never change"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http|#)([^)#]+)\)", PAGE):
        assert (FOLDER / target).exists(), target
    headings = {
        re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= headings
