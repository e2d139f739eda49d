"""Each command of the documentation is run by a test, or its block says that it isn't."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from hack import REPOSITORY
from tests.commands import PAGES, commands

RUN_BY = {
    r"make (train|merge|gguf)\b": "tests/integration/trainer/test_local.py",
    r"make doctor$": "tests/unit/trainer/test_gpus.py",
    r"make (demo|demo-down)$": "tests/e2e/test_main_job.py",
    r"make (test|test-operator)\b": ".ci/run",
    r"make (build|help|test-all|test-unit)\b": ".ci/run",
    r"make release$": "tests/unit/test_release.py",
    r"openssl (dgst|ecparam|ec) ": "tests/unit/test_release.py",
    r"make docs$": "tests/unit/test_docs_site.py",
    r"make chaos": "tests/integration/kwok/test_chaos.py",
    r"(make|python -m benchmarks\.)\s?gpu": "tests/unit/test_benchmarks_gpu.py",
    r"(\w+=\S+ )?\.venv/bin/python -m pytest ": ".ci/run",
    r"\.venv/bin/python -m benchmarks": "tests/unit/test_performance.py",
    r"docker build -f images/(operator|trainer)/Dockerfile ": "tests/e2e/conftest.py",
    r"helm (install|upgrade|rollback|uninstall) finetune": "tests/integration/test_helm.py",
    r"finetune (init|validate) ": "tests/unit/cli/test_documents.py",
    r"finetune ": "tests/integration/operator/test_cli.py",
    r"kubectl ": "tests/integration/operator/test_docs_commands.py",
    r"(ls|head|cd) ": "tests/integration/trainer/test_local.py",
    r"finetune-trainer <stage> ": "tests/e2e/test_main_job.py",
    r"pip install model-signing ": "pyproject.toml",
    r"model_signing verify key ": "tests/integration/trainer/test_signing.py",
    r"sha256sum --check SHA256SUMS$": "tests/integration/trainer/test_docs_export.py",
}
"""Commands, and the test that runs them or, where they wrap it, what they call."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_each_command_is_run_by_a_test_or_marked_as_not_run(page: Path) -> None:
    unknown = [each for each in commands(page) if not any(re.match(one, each) for one in RUN_BY)]
    assert unknown == []


def test_the_tests_that_run_them_are_there() -> None:
    assert [name for name in RUN_BY.values() if not (REPOSITORY / name).is_file()] == []
    every = [command for page in PAGES for command in commands(page)]
    assert [one for one in RUN_BY if not any(re.match(one, command) for command in every)] == []


def test_each_value_of_the_chart_that_a_command_sets_is_there() -> None:
    chart = REPOSITORY / "charts" / "finetune-operator"
    values = yaml.safe_load((chart / "values.yaml").read_text())
    named = [
        name
        for page in PAGES
        for command in commands(page)
        if command.startswith("helm ")
        for name in re.findall(r"--set (\S+?)=", command)
    ]
    assert named
    for name in named:
        found = values
        for part in name.split("."):
            assert part in found, name
            found = found[part]


TUTORIAL = sorted((REPOSITORY / "docs" / "tutorial").glob("*.md"))
BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", TUTORIAL, ids=lambda page: page.stem)
def test_the_spanish_tutorial_has_the_same_commands(page: Path) -> None:
    spanish = REPOSITORY / "docs" / "es" / page.name
    here, there = (BLOCK.findall(each.read_text(encoding="utf-8")) for each in (page, spanish))
    assert here
    assert here == there


def test_no_spanish_page_is_left_over() -> None:
    names = {page.name for page in (REPOSITORY / "docs" / "es").glob("*.md")}
    assert names == {page.name for page in TUTORIAL}
