"""Every example is what the API takes, and the gallery's page names each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator.api.finetunejob import FineTuneJobSpec
from tests.gitops import EXAMPLES as GITOPS
from tests.gitops import render

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
FILES = [*EXAMPLES.glob("*.yaml"), *(EXAMPLES / "gallery").glob("*.yaml")]
PAGE = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")


def finetunejobs(text: str) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(text) if each["kind"] == "FineTuneJob"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_each_example_is_a_valid_finetunejob(file: Path) -> None:
    found = finetunejobs(file.read_text(encoding="utf-8"))
    assert found
    for each in found:
        FineTuneJobSpec.model_validate(each["spec"])


@pytest.mark.parametrize("overlay", ["staging", "production"])
def test_each_overlay_renders_a_valid_finetunejob(overlay: str) -> None:
    (found,) = finetunejobs(render(GITOPS / "teams", overlay))
    assert (
        FineTuneJobSpec.model_validate(found["spec"]).output.uri == f"s3://models/{overlay}/support"
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_gallery_names_each_example(file: Path) -> None:
    assert f"../{file.relative_to(ROOT)}" in PAGE


def test_no_two_examples_write_to_the_same_folder() -> None:
    jobs = [job for file in FILES for job in finetunejobs(file.read_text(encoding="utf-8"))]
    folders = [job["spec"]["output"]["uri"] for job in jobs]
    assert len(set(folders)) == len(folders)
