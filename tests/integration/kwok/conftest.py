"""Fixtures: a cluster of fake nodes with the chart's rights, and the operator on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hack.kwok.cluster import KwokCluster
from hack.operator_process import Operator, install
from tests.fixtures import start_or_leave_out
from tests.integration.operator.stage import Namespace, new_namespace

NODE = "fake-1"


@pytest.fixture(scope="package")  # no longer than it is needed: an idle one takes CPU, too
def kwok_cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[KwokCluster]:
    """Control plane, scheduler and one large node with 8 GPUs; the chart is installed on it."""
    cluster = KwokCluster(tmp_path_factory.mktemp("kwok"))
    start_or_leave_out(request.config, "kwok's nodes", cluster.start)
    try:
        cluster.add_node(NODE, gpus=8)
        install(cluster.plane)
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def operator(
    kwok_cluster: KwokCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Operator]:
    """A running operator with the chart's rights."""
    operator = Operator(kwok_cluster.plane, tmp_path_factory.mktemp("operator"))
    operator.start()
    yield operator
    operator.stop()


@pytest.fixture
def here(kwok_cluster: KwokCluster, operator: Operator) -> Iterator[Namespace]:
    """An empty namespace that the running operator watches."""
    with new_namespace(kwok_cluster.plane) as namespace:
        yield namespace
        operator.ready()  # no test may leave a dead operator behind
