"""What tests stand on: a real control plane, or a quick S3 server.

Where the machine can't run one, the tests that need it are left out, with the reason and the
remedy at the end of the run. In CI (`CI=true`) that is a failure: there nothing may go missing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, NoReturn

import pytest

from hack.cluster import versions
from hack.cluster.control_plane import ControlPlane
from hack.object_store import Credentials
from hack.process import Unavailable

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

LEFT_OUT: pytest.StashKey[set[str]] = pytest.StashKey()
WORKER_KEY = "left-out"


def _left_out(config: pytest.Config) -> set[str]:
    return config.stash.setdefault(LEFT_OUT, set())


def leave_out(config: pytest.Config, reason: str) -> NoReturn:
    """Skip a test and say so at the end of the run; in CI fail it instead."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI may leave nothing out: {reason}", pytrace=False)
    _left_out(config).add(reason)
    pytest.skip(reason)


def require_supported(config: pytest.Config, plane: ControlPlane) -> ControlPlane:
    """Leave a test out on the last resort of a machine that can get no supported server."""
    if plane.minor_version not in versions.MINORS:
        reason = f"Kubernetes {plane.version} drops rules and policies without a word"
        leave_out(config, f"{reason}; use 1.{versions.MINORS[0]} or newer")
    return plane


def start_or_leave_out(config: pytest.Config, what: str, start: Callable[[], None]) -> None:
    """Start what a test stands on, with its progress shown: a first build takes minutes."""
    capture = config.pluginmanager.getplugin("capturemanager")
    reason = ""
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        try:
            start()
        except Unavailable as error:
            reason = f"{what}: {error}"
    if reason:
        leave_out(config, reason)


@pytest.fixture(scope="session")
def control_plane(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ControlPlane]:
    """etcd, kube-apiserver and kube-controller-manager with RBAC on, for the whole session."""
    plane = ControlPlane(tmp_path_factory.mktemp("control-plane"))
    start_or_leave_out(request.config, "the real control plane", plane.start)
    yield plane
    plane.stop()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let a worker hand over what it left out."""
    if output := getattr(session.config, "workeroutput", None):
        output[WORKER_KEY] = sorted(_left_out(session.config))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: WorkerController) -> None:
    """Take over what a worker left out."""
    reasons = getattr(node, "workeroutput", {}).get(WORKER_KEY, [])
    _left_out(node.config).update(reasons)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Name what this run left out, and what would change that."""
    for reason in sorted(_left_out(config)):
        terminalreporter.write_line(f"left out: {reason}", yellow=True)


@contextmanager
def moto_server() -> Iterator[Credentials]:
    """Run moto's S3 server on a free loopback port: quick, and it accepts any keys."""
    from moto.server import ThreadedMotoServer  # half a second, for those who need it

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield Credentials(f"http://{host}:{port}", "testing", "testing")
    finally:
        server.stop()
