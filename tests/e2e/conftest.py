"""The environment of the end-to-end tests, brought up once for all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cluster.fixtures import start_or_leave_out
from tests.e2e import environment as env
from tests.e2e.environment import Environment

NAME = "e2e"
KEEP = "FINETUNE_KEEP_CLUSTER"


@pytest.fixture(scope="session")
def environment(request: pytest.FixtureRequest) -> Iterator[Environment]:
    """A cluster of its own with operator and store; FINETUNE_KEEP_CLUSTER=1 leaves it running."""
    started: list[Environment] = []
    start_or_leave_out(request.config, "a real node", lambda: started.append(env.bring_up(NAME)))
    yield started[0]
    if not os.environ.get(KEEP):
        env.take_down(NAME)
