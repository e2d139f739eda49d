"""The README keeps up with the code."""

from __future__ import annotations

import re
from pathlib import Path

from finetune_trainer.contract import Reason

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_every_reason_is_explained_and_no_other() -> None:
    rows = re.findall(r"^\| `([A-Z]\w+)` \| .+ \| .+ \|$", README, re.MULTILINE)
    assert sorted(rows) == sorted({str(reason) for reason in Reason} - {"Succeeded"})


def test_every_make_target_in_the_readme_exists() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z][a-z0-9-]+)", README)) <= targets
