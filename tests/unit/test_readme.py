"""The README and the table of reasons keep up with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from finetune_operator.api.finetunejob import FineTuneJobSpec
from finetune_trainer.contract import Reason

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
INSTALL = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
REASONS = OPERATIONS.partition("## Every reason")[2].partition("## ")[0]
ROW = re.compile(r"^\| `([A-Z]\w+)` \| .+ \| (.+) \| (.+) \|$", re.MULTILINE)


def test_every_reason_is_explained_and_no_other() -> None:
    rows = [reason for reason, _, _ in ROW.findall(REASONS)]
    assert sorted(rows) == sorted({str(reason) for reason in Reason} - {"Succeeded"})


def test_what_is_tried_again_says_so() -> None:
    for reason, does, _ in ROW.findall(REASONS):
        assert not (does.startswith("Stops: ") and Reason(reason).retryable), reason


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.MULTILINE))
FIRST_SCREEN = README.partition("\n## ")[0]
GATED = ("meta-llama/", "google/gemma", "mistralai/")


def test_the_first_job_is_valid_in_ten_lines_and_needs_no_token() -> None:
    (block,) = re.findall(r"^```yaml\n(.+?)^```$", FIRST_SCREEN, re.MULTILINE | re.DOTALL)
    assert len(block.splitlines()) <= 10
    spec = FineTuneJobSpec.model_validate(yaml.safe_load(block)["spec"])
    assert spec.model.token_secret_ref is None
    assert not spec.model.source.startswith(GATED)


def test_the_first_screen_says_what_it_costs_and_what_was_not_run() -> None:
    assert len(FIRST_SCREEN.splitlines()) < 60
    for needed in ("make demo", "minutes", "GB", "has run on a GPU", "No image is published"):
        assert needed in FIRST_SCREEN


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_that_a_page_calls_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    called = re.findall(r"(?:`|^ {4}|^\$ )make ([a-z][a-z0-9-]+)", text, re.MULTILINE)
    assert set(called) <= TARGETS


RETRY = "↻"


def test_a_remedy_outside_the_spec_says_how_it_is_tried_again() -> None:
    """Without an edit nothing would happen: not for an upload, a licence, a right or a Secret."""
    assert "finetune.dev/retry-requested-at" in INSTALL
    rows = [(reason, remedy) for reason, _, remedy in ROW.findall(REASONS)]
    outside = (
        r"\b(Upload|Save|Correct the (header|rows)|Accept|Create it|Check the Secret|Delete)\b"
    )
    needed = {reason for reason, remedy in rows if re.search(outside, remedy)}
    said = {reason for reason, remedy in rows if RETRY in remedy}
    assert needed - said == {"SecretNotFound"}  # whose pod starts by itself
    assert len(needed) > 7
