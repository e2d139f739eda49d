"""The environment of the end-to-end tests, brought up once for all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hack.demo import environment as env
from hack.demo.environment import Environment
from tests.fixtures import start_or_leave_out

NAME = "e2e"
KEEP = "FINETUNE_KEEP_CLUSTER"
MODEL = Path(__file__).parents[1] / "data" / "first_release" / "inputs" / "model"


# Not for the session: an idle cluster takes a fifth of a CPU from the tests that come after.
@pytest.fixture(scope="package")
def environment(request: pytest.FixtureRequest) -> Iterator[Environment]:
    """A cluster of its own with operator and store; FINETUNE_KEEP_CLUSTER=1 leaves it running."""
    env.take_down(NAME)  # what a run that was ended from outside has left: a store that holds all
    started: list[Environment] = []
    start_or_leave_out(request.config, "a real node", lambda: started.append(env.bring_up(NAME)))
    yield started[0]
    if not os.environ.get(KEEP):
        env.take_down(NAME)


@pytest.fixture(scope="package")
def one_layer(environment: Environment) -> str:
    """The URI of a model of one layer, which trains a step in milliseconds."""
    for file in sorted(MODEL.iterdir()):
        environment.store.client().upload_file(str(file), "models", f"one-layer/{file.name}")
    return "s3://models/one-layer"
