"""docs/cli.md says what the command line does."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from finetune_cli.exits import ExitCode
from finetune_cli.main import app

PAGE = (Path(__file__).parents[3] / "docs" / "cli.md").read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
EXAMPLES = re.findall(r"^    (finetune .*)$", PAGE, re.MULTILINE)


def test_every_command_is_described_and_has_an_example() -> None:
    table = PAGE.partition("## Commands")[2].partition("## ")[0]
    assert re.findall(r"^\| `([a-z]+)`", table, re.MULTILINE) == list(COMMANDS)
    shown = {shlex.split(line)[1] for line in EXAMPLES}
    assert set(COMMANDS) - shown == set()


@pytest.mark.parametrize("line", EXAMPLES)
def test_each_example_can_be_typed(line: str) -> None:
    _, name, *words = shlex.split(line, comments=True)
    COMMANDS[name].make_context(name, words)


def test_every_exit_code_is_explained() -> None:
    table = PAGE.partition("## Exit codes")[2]
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)] == list(
        ExitCode
    )
