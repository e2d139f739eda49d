"""What can't be tested on a machine is said, and in CI it is a failure."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.fixtures import LEFT_OUT, require_supported

LAST_RESORT: Any = SimpleNamespace(minor_version=20, version="v1.20.2")
REASON = "Kubernetes v1.20.2 drops rules and policies without a word; use 1.33 or newer"


@pytest.fixture
def config() -> Any:
    return SimpleNamespace(stash=pytest.Stash())


def test_the_last_resort_leaves_tests_out_and_says_so(
    monkeypatch: pytest.MonkeyPatch, config: Any
) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=REASON):
        require_supported(config, LAST_RESORT)
    assert config.stash[LEFT_OUT] == {REASON}


def test_in_ci_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch, config: Any) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=f"CI may leave nothing out: {REASON}"):
        require_supported(config, LAST_RESORT)


@pytest.mark.parametrize("minor", [33, 37])
def test_a_supported_server_serves(
    monkeypatch: pytest.MonkeyPatch, config: Any, minor: int
) -> None:
    monkeypatch.setenv("CI", "true")
    server: Any = SimpleNamespace(minor_version=minor, version=f"v1.{minor}.1")
    assert require_supported(config, server) is server
