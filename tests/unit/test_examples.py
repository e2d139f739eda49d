"""Every example is what the API takes, and the gallery's page names each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from finetune_operator.api.finetunejob import FineTuneJobSpec
from tests.gitops import EXAMPLES as GITOPS
from tests.gitops import render

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
CHART = ROOT / "charts" / "finetune-operator"
FILES = [*EXAMPLES.glob("*.yaml"), *(EXAMPLES / "gallery").glob("*.yaml")]
FIRST = "quickstart.yaml"
"""The job of the demo once more, in few lines."""

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
    assert file.name == FIRST or f"../{file.relative_to(ROOT)}" in PAGE


def test_no_two_examples_write_to_the_same_folder() -> None:
    others = [file for file in FILES if file.name != FIRST]
    jobs = [job for file in others for job in finetunejobs(file.read_text(encoding="utf-8"))]
    folders = [job["spec"]["output"]["uri"] for job in jobs]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("file", ["argocd/operator.yaml", "flux/operator.yaml"])
def test_the_operator_is_installed_with_values_that_the_chart_takes(file: str) -> None:
    *_, found = yaml.safe_load_all((GITOPS / file).read_text(encoding="utf-8"))
    spec = found["spec"]
    argo = spec.get("source", {}).get("helm")
    values = argo["valuesObject"] if argo else spec["values"]
    jsonschema.validate(values, json.loads((CHART / "values.schema.json").read_text()))
    path = spec["source"]["path"] if argo else spec["chart"]["spec"]["chart"]
    assert (ROOT / path).resolve() == CHART
    assert (argo or spec)["releaseName"] == CHART.name


def test_the_jobs_are_synced_from_a_folder_that_is_there() -> None:
    application = yaml.safe_load((GITOPS / "argocd" / "application.yaml").read_text())
    *_, kustomization = yaml.safe_load_all((GITOPS / "flux" / "sync.yaml").read_text())
    for path in (application["spec"]["source"]["path"], kustomization["spec"]["path"]):
        assert (GITOPS / path / "kustomization.yaml").is_file()
    assert (kustomization["spec"]["wait"], kustomization["spec"]["prune"]) == (True, True)
    assert "ServerSideApply=true" in application["spec"]["syncPolicy"]["syncOptions"]
