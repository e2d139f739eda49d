"""How `finetune` starts, and what it says without a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from finetune_cli.exits import ExitCode
from finetune_cli.main import app, complete

ROOT = Path(__file__).parents[3]
HEAVY = {"torch", "transformers", "peft", "datasets", "kopf", "boto3", "kubernetes", "pydantic"}


def test_help_imports_nothing_heavy_and_fits_a_screen() -> None:
    code = (
        "import sys; sys.argv = ['finetune', '--help']\n"
        "from finetune_cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('loaded', *{each.partition('.')[0] for each in sys.modules})"
    )
    paths = os.pathsep.join(str(ROOT / each) for each in ("cli", "operator", "trainer"))
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "80"}
    shown = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    *lines, loaded = shown.stdout.splitlines()
    assert set(loaded.split()) & HEAVY == set()
    assert len(lines) <= 40
    assert not [line for line in lines if line.endswith("...") and "OPTIONS" not in line]


@pytest.mark.parametrize("command", ["list", "watch", "submit"])
def test_without_a_cluster_the_remedy_is_named(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    more = {"list": [], "watch": ["x"], "submit": ["-f", "x.yaml"]}[command]
    found = CliRunner().invoke(app, [command, *more])
    assert found.exit_code == ExitCode.UNREACHABLE
    assert found.stderr.count("\n") == 1
    assert "--kubeconfig" in found.stderr


def test_an_unreachable_server_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config"
    file.write_text(
        "{apiVersion: v1, kind: Config, current-context: away,"
        " clusters: [{name: a, cluster: {server: 'http://127.0.0.1:9'}}],"
        " users: [{name: a, user: {}}],"
        " contexts: [{name: away, context: {cluster: a, user: a, namespace: team}}]}"
    )
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    found = CliRunner().invoke(app, ["list", "--kubeconfig", str(file)])
    assert found.exit_code == ExitCode.UNREACHABLE
    assert "http://127.0.0.1:9 can't be reached (context away)" in found.stderr


def test_a_wrong_flag_is_a_usage_error() -> None:
    assert CliRunner().invoke(app, ["list", "--nonsense"]).exit_code == ExitCode.USAGE
    assert CliRunner().invoke(app, ["lst"]).exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("words", "first", "last"),
    [
        ([""], "init", ":4"),
        (["wa"], "watch", ":4"),
        (["submit", "--wa"], "--watch", ":4"),
        (["list", "-o", "j"], "json", ":4"),
        (["submit", "-f", ""], ":0", ":0"),
        (["submit", "--filename=job"], ":0", ":0"),
        (["list", "--context=job"], ":4", ":4"),
        (["init", ""], ":0", ":0"),
        (["init", "--na"], "--name", ":0"),
    ],
)
def test_kubectl_completes_commands_flags_values_and_files(
    words: list[str],
    first: str,
    last: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the program that kubectl looks for: kubectl_complete-<plugin>."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["kubectl_complete-finetune"] == "finetune_cli.main:complete"
    for name in ("COMP_WORDS", "COMP_CWORD", "_FINETUNE_COMPLETE"):
        monkeypatch.setenv(name, "")  # and gone afterwards
    monkeypatch.setattr(sys, "argv", ["kubectl_complete-finetune", *words])
    complete()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(first)
    assert lines[-1] == last
