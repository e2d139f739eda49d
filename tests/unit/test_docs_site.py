"""The documentation as a site: it builds without a warning, and its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
import yaml

from hack import REPOSITORY
from hack.docs_site import VARIABLE, lead
from hack.reference_page import page
from tests.chart import render

DOCS = REPOSITORY / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_on_the_site(site: Path) -> None:
    pages = [file.relative_to(DOCS).with_suffix(".html") for file in DOCS.rglob("*.md")]
    assert [page for page in pages if not (site / page).is_file()] == []
    assert (site / "contributing.html").is_file()


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    fetched = r"<(script|img|iframe)[^>]*src=[\"']?https?:|<link rel=\"?stylesheet\"?[^>]*https?:"
    pages = list(site.rglob("*.html"))
    assert [file.name for file in pages if re.search(fetched, file.read_text())] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](data.md#rows)", "[a](../data.md#rows)"),
        ("[a](../CONTRIBUTING.md)", "[a](../contributing.md)"),
        ("[job](../examples/finetunejob.yaml)", "job (`examples/finetunejob.yaml`)"),
        ("[`crds/x`](../crds/x)", "`crds/x`"),
        ("[a](https://kueue.sigs.k8s.io) [b](#here)", "[a](https://kueue.sigs.k8s.io) [b](#here)"),
    ],
)
def test_a_link_leads_on_from_the_site(
    text: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert lead(text, PurePosixPath("docs/a.md"), PurePosixPath("there/a.md")) == expected


def test_a_link_leads_to_the_repository_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "https://git.example.com/team/operator/")
    text = lead("[job](../examples/a.yaml)", PurePosixPath("docs/a.md"), PurePosixPath("a.md"))
    assert text == "[job](https://git.example.com/team/operator/blob/main/examples/a.yaml)"


def test_the_reference_has_what_is_required_in_bold_with_its_rules() -> None:
    text = page()
    assert text == (DOCS / "reference.md").read_text(encoding="utf-8")
    assert re.search(r"^\| \*\*`uri`\*\* \| string \|", text, re.MULTILINE)
    assert "| `backoffLimit` | integer | `2` |" in text
    assert "- must have importanceMatrix: true with the types IQ2 and IQ3 in gguf" in text


def test_the_list_of_images_is_what_the_chart_names() -> None:
    text = (DOCS / "air-gapped.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(finetune-operator/\S+?)` \|", text, re.MULTILINE))
    rendered = yaml.safe_dump_all(render())
    images = re.findall(r"(?:image|value): (\S+/(?:operator|trainer):\S+)", rendered)
    assert named == set(images)
