"""Fixtures that all tests may ask for, and how the tests run: side by side, on one thread each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis.database import DirectoryBasedExampleDatabase

from hack import cache_dir

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler.protocol import Scheduling
    from xdist.workermanage import WorkerController

pytest_plugins = ["tests.fixtures"]

# Before anything imports torch: two workers with threads for all CPUs wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Each run tries other examples. One that failed is kept, and tried first from then on.
settings.register_profile(
    "finetune",
    deadline=None,
    derandomize=False,
    print_blob=True,
    database=DirectoryBasedExampleDatabase(cache_dir() / "hypothesis"),
)
settings.load_profile("finetune")

INTEGRATION = Path("tests/integration")
TRAINER = INTEGRATION / "trainer"
# Native nodes of one machine share folders below /var/lib, so one worker has both, one by one.
END_TO_END = Path("tests/e2e")
NODE_FILES = (END_TO_END, INTEGRATION / "test_cluster_native.py")
# The order in which workers take the files. A long one at the end would run alone.
LONG_FILES = [
    END_TO_END / "test_main_job.py",  # first of all, in an empty cluster
    END_TO_END,
    TRAINER / "test_resume.py",
    TRAINER / "test_distributed.py",
    TRAINER / "test_architectures.py",
    TRAINER / "test_pipeline.py",
    TRAINER / "test_export_quality.py",
    INTEGRATION / "kwok" / "test_chaos.py",
    INTEGRATION / "kwok",
    INTEGRATION,
]
# These wait for controllers more than they compute. With three workers or more, one takes them
# before anything else, and the others take them last, so that no CPU is idle meanwhile. The last
# two use the control plane that is there by then.
WAITING_FILES = (
    INTEGRATION / "kwok",
    INTEGRATION / "operator",
    INTEGRATION / "test_cluster_control_plane.py",
    TRAINER / "test_progress.py",
)
WAITING_WORKER = "gw2"


def file_of(nodeid: str) -> Path:
    return Path(nodeid.partition("::")[0])


def mostly_waits(scope: str) -> bool:
    return any(file_of(scope).is_relative_to(each) for each in WAITING_FILES)


def rank(file: Path) -> int:
    """A file's place in LONG_FILES; those without one come last."""
    places = (n for n, long in enumerate(LONG_FILES) if file.is_relative_to(long))
    return next(places, len(LONG_FILES))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-families", action="store_true", help="test every family of models instead of three"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only a release tests; put long files first where workers share them."""
    if not config.getoption("all_families"):
        left_out = [item for item in items if item.get_closest_marker("every_family")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("every_family")]
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: rank(file_of(item.nodeid)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    """Give each worker whole files, whose fixtures are then made once."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):  # type: ignore[misc] # xdist has no types
        def _split_scope(self, nodeid: str) -> str:
            on_node = any(file_of(nodeid).is_relative_to(each) for each in NODE_FILES)
            return "a node" if on_node else super()._split_scope(nodeid)

        def _assign_work_unit(self, node: WorkerController) -> None:
            waits = node.gateway.id == WAITING_WORKER
            if self.numnodes > 2:
                mine = (each for each in self.workqueue if mostly_waits(each) == waits)
                if scope := next(mine, None):
                    self.workqueue.move_to_end(scope, last=False)
            super()._assign_work_unit(node)

    config.option.loadscopereorder = False
    return Files(config, log)
