"""Fixtures: the operator under its chart's rights, and a namespace for each test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hack.cluster.control_plane import ControlPlane
from hack.operator_process import Operator, install
from tests.fixtures import require_supported
from tests.integration.operator.stage import Namespace, new_namespace


@pytest.fixture(scope="session")
def installed(control_plane: ControlPlane) -> ControlPlane:
    """A control plane on which the chart is installed, except that nothing runs there."""
    install(control_plane)
    return control_plane


@pytest.fixture(scope="module")
def operator(
    installed: ControlPlane, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Operator]:
    """A running operator."""
    operator = Operator(installed, tmp_path_factory.mktemp("operator"))
    operator.start()
    yield operator
    operator.stop()


@pytest.fixture(scope="session")
def supported(request: pytest.FixtureRequest, installed: ControlPlane) -> ControlPlane:
    """The same; a test that asks for it is left out on the last resort of a poor machine."""
    return require_supported(request.config, installed)


@pytest.fixture
def older_definition(supported: ControlPlane) -> Iterator[None]:
    """The definition as of before a rule: a chart's upgrade doesn't replace it."""
    name = "crd/finetunejobs.finetune.dev"
    today = json.loads(supported.kubectl("get", name, "-o", "json"))
    del today["metadata"]["resourceVersion"]
    older = without_rules(today)
    default = Namespace(supported, "default")
    wrong = {"training": {"epochs": 0}}
    supported.kubectl("replace", "-f", "-", input=json.dumps(older))
    default.wait("the older definition", lambda: not default.refusal(**wrong))
    yield
    supported.kubectl("replace", "-f", "-", input=json.dumps(today))
    default.wait("today's definition", lambda: default.refusal(**wrong))
    default.close()


def without_rules(node: Any) -> Any:
    """The same document without its validation rules."""
    if isinstance(node, list):
        return [without_rules(each) for each in node]
    if not isinstance(node, dict):
        return node
    rules = "x-kubernetes-validations"
    return {name: without_rules(each) for name, each in node.items() if name != rules}


@pytest.fixture
def here(installed: ControlPlane, operator: Operator) -> Iterator[Namespace]:
    """An empty namespace that the running operator watches."""
    with new_namespace(installed) as namespace:
        yield namespace
        operator.ready()  # no test may leave a dead operator behind


@pytest.fixture
def mortal(installed: ControlPlane, tmp_path: Path) -> Iterator[Operator]:
    """An operator that the test may kill."""
    operator = Operator(installed, tmp_path)
    operator.start()
    yield operator
    operator.stop()
