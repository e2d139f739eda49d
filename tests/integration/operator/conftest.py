"""Fixtures: the operator under its chart's rights, and a namespace for each test."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest

from hack.cluster.control_plane import ControlPlane
from tests.integration.operator.process import Operator, install
from tests.integration.operator.stage import Namespace


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


@pytest.fixture
def here(installed: ControlPlane, operator: Operator) -> Iterator[Namespace]:
    """An empty namespace that the running operator watches."""
    name = f"test-{uuid4().hex[:8]}"
    installed.kubectl("create", "namespace", name)
    namespace = Namespace(installed, name)
    yield namespace
    operator.ready()  # no test may leave a dead operator behind
    namespace.close()
    installed.kubectl("delete", "namespace", name, "--wait=false")
