"""`finetune init` and `finetune validate`, which need no cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from finetune_cli.exits import ExitCode
from finetune_cli.main import app

ROOT = Path(__file__).parents[3]

GOOD = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata:
  name: support
spec:
  model:
    source: org/base
  dataset:
    source: s3://data/faq.csv
  output:
    uri: s3://models/support
"""


def validate(*files: Path, code: ExitCode = ExitCode.OK, text: str | None = None) -> Result:
    named = [word for file in files for word in ("-f", str(file))]
    found = CliRunner().invoke(app, ["validate", "--offline", *named], input=text)
    assert found.exit_code == code, found.output
    return found


def write(folder: Path, text: str) -> Path:
    file = folder / "job.yaml"
    file.write_text(text)
    return file


def test_all_examples_are_valid() -> None:
    files = sorted((ROOT / "examples").glob("*.yaml"))
    assert validate(*files).stdout.count(" is valid.") >= len(files)


def test_several_documents_and_other_kinds(tmp_path: Path) -> None:
    other = "kind: ConfigMap\nmetadata: {name: x}\n"
    text = f"{GOOD}---\n{other}---\n{GOOD.replace('name: support', 'name: second')}---\n"
    file = write(tmp_path, text)
    assert validate(file).stdout.splitlines() == [
        f"{file}:1: support is valid.",
        f"{file}:16: second is valid.",
    ]
    assert "standard input:1" in validate(Path("-"), text=GOOD).stdout
    lone = write(tmp_path, other)
    assert "found ConfigMap" in validate(lone, code=ExitCode.USAGE).stderr


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("source: org/base", "sauce: org/base", ":7: spec.model.sauce: there is no such field; "),
        ("source: org/base", "sauce: org/base", ":6: spec.model.source: is missing"),
        ("uri: s3://models/support", "uri: 5", ":11: spec.output.uri: "),
        ("s3://models/support\n", "s3://a/b\n  training: {epochs: 0}\n", ":12: spec.training."),
        ("name: support", "name: Support", ":4: metadata.name: must be lower-case"),
        ("v1alpha1", "v2", ":1: apiVersion: must be finetune.dev/v1alpha1"),
        ("    uri: s3", "\turi: s3", ":11: this is no YAML: "),
    ],
)
def test_each_fault_has_file_line_and_field(tmp_path: Path, old: str, new: str, said: str) -> None:
    file = write(tmp_path, GOOD.replace(old, new))
    assert f"{file}{said}" in validate(file, code=ExitCode.USAGE).stderr


def test_the_field_that_was_meant_is_named(tmp_path: Path) -> None:
    text = f"{GOOD}  training:\n    learningrate: 1.0e-4\n    lora: {{rank: 8, dropOut: 0.1}}\n"
    said = validate(write(tmp_path, text), code=ExitCode.USAGE).stderr
    assert "did you mean learningRate?" in said
    assert "did you mean dropout?" in said


def test_no_secret_of_the_environment_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijkl")
    text = f"{GOOD}  training:\n    epochs: hf_abcdefghijkl\n"
    assert "hf_abc" not in validate(write(tmp_path, text), code=ExitCode.USAGE).stderr


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    validate(tmp_path / "none.yaml", code=ExitCode.NOT_FOUND)


def test_init_writes_a_valid_file_once(tmp_path: Path) -> None:
    file = tmp_path / "new.yaml"
    flags = ["--dataset", "s3://data/faq.csv", "--to", "s3://models/faq", "--gpus", "2"]
    first = CliRunner().invoke(app, ["init", str(file), "--name", "faq", *flags])
    assert first.exit_code == 0, first.output
    assert f"finetune submit -f {file}" in first.stdout
    validate(file)
    assert len(file.read_text().splitlines()) <= 10
    written = yaml.safe_load(file.read_text())
    limits = written["spec"]["stages"]["train"]["resources"]["limits"]
    assert (written["metadata"]["name"], limits) == ("faq", {"nvidia.com/gpu": 2})
    again = CliRunner().invoke(app, ["init", str(file)])
    assert again.exit_code == ExitCode.USAGE
    assert "--force" in again.stderr


@pytest.mark.parametrize(
    "command", [["validate", "--offline"], ["plan", "--offline"], ["submit", "--context", "a"]]
)
def test_two_namespaces_are_one_too_many(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config"
    config.write_text(
        "{clusters: [{name: a, cluster: {server: 'http://127.0.0.1:9'}}],"
        " users: [{name: a, user: {}}], contexts: [{name: a, context: {cluster: a, user: a}}]}"
    )
    monkeypatch.setenv("KUBECONFIG", str(config))
    file = write(tmp_path, GOOD.replace("name: support", "name: support\n  namespace: team"))
    found = CliRunner().invoke(app, [*command, "-f", str(file), "-n", "prod"])
    assert found.exit_code == ExitCode.USAGE, found.output
    assert f"{file}:5: metadata.namespace is team, and -n names prod" in found.stderr
