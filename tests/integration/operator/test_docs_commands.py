"""The documentation's kubectl commands, as they stand there, on the real API server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hack import REPOSITORY
from hack.cluster import binaries
from hack.cluster.control_plane import ControlPlane
from hack.operator_process import NAMESPACE
from hack.process import output
from tests.commands import PAGES, commands
from tests.integration.operator.stage import Namespace, new_namespace

TYPED = {page: [each for each in commands(page) if each.startswith("kubectl ")] for page in PAGES}
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
FIRST_JOB = re.findall(r"^```yaml\n(.+?)^```$", README, re.MULTILINE | re.DOTALL)[0]


@pytest.fixture(scope="module")
def there(supported: ControlPlane) -> Iterator[Namespace]:
    """A namespace with the README's FineTuneJob, which is called support-bot."""
    with new_namespace(supported) as namespace:
        supported.kubectl("apply", "-n", namespace.name, "-f", "-", input=FIRST_JOB)
        yield namespace


@pytest.fixture
def shell(there: Namespace, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A reader's environment, whose kubectl speaks of the namespace; `PWD` is where to type."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "kubectl").symlink_to(binaries.kubectl())
    config = tmp_path / "kubeconfig"
    shutil.copy(there.plane.kubeconfig, config)
    kubectl = [str(binaries.kubectl()), "--kubeconfig", str(config)]
    output([*kubectl, "config", "set-context", "--current", "--namespace", there.name])
    for folder in ("examples", "crds", "charts"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    (tmp_path / "finetunejob.yaml").write_text(FIRST_JOB)
    for name in ("ca.crt", "private-key.pem"):
        (tmp_path / name).write_text("of the reader")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    yield {**os.environ, "PATH": path, "KUBECONFIG": str(config), "PWD": str(tmp_path)}
    there.plane.kubectl("delete", "secrets,configmaps", "--all", "-n", there.name)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if TYPED[page]], ids=lambda page: str(page.name)
)
def test_each_kubectl_command_works_as_it_is_written(page: Path, shell: dict[str, str]) -> None:
    for command in TYPED[page]:
        done = subprocess.run(
            ["bash", "-ec", command],
            env=shell,
            cwd=shell["PWD"],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,  # a command that goes on, such as a watch, is to be marked
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def test_what_the_commands_do_is_what_the_pages_say(there: Namespace) -> None:
    raw = json.loads(there.plane.kubectl("get", "ftj/support-bot", "-n", there.name, "-o", "json"))
    assert raw["spec"]["suspend"] is True
    assert "finetune.dev/retry-requested-at" in raw["metadata"]["annotations"]
    assert there.plane.kubectl("get", "namespace", NAMESPACE, "-o", "name")
