"""The README and the table of reasons keep up with the code."""

from __future__ import annotations

import re
from pathlib import Path

from finetune_trainer.contract import Reason

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
REASONS = OPERATIONS.partition("## Every reason")[2].partition("## ")[0]
ROW = re.compile(r"^\| `([A-Z]\w+)` \| .+ \| (.+) \| (.+) \|$", re.MULTILINE)


def test_every_reason_is_explained_and_no_other() -> None:
    rows = [reason for reason, _, _ in ROW.findall(REASONS)]
    assert sorted(rows) == sorted({str(reason) for reason in Reason} - {"Succeeded"})


def test_what_is_tried_again_says_so() -> None:
    for reason, does, _ in ROW.findall(REASONS):
        assert not (does.startswith("Stops: ") and Reason(reason).retryable), reason


def test_every_make_target_in_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z][a-z0-9-]+)", README)) <= targets


RETRY = "↻"


def test_a_remedy_outside_the_spec_says_how_it_is_tried_again() -> None:
    """Without an edit nothing would happen: not for an upload, a licence, a right or a Secret."""
    assert "finetune.dev/retry-requested-at" in README
    rows = [(reason, remedy) for reason, _, remedy in ROW.findall(REASONS)]
    outside = (
        r"\b(Upload|Save|Correct the (header|rows)|Accept|Create it|Check the Secret|Delete)\b"
    )
    needed = {reason for reason, remedy in rows if re.search(outside, remedy)}
    said = {reason for reason, remedy in rows if RETRY in remedy}
    assert needed - said == {"SecretNotFound"}  # whose pod starts by itself
    assert len(needed) > 7
