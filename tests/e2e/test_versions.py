"""Versions on a real node: new data under the same key, back to an old version, and forth again.

Then another artifact.

The tests build on each other and run in this order.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from hack.demo.environment import EXAMPLE, Environment

NAME = "changing"
OUTPUT = "s3://artifacts/changing"
ROWS = list(csv.reader((EXAMPLE.parent / "data" / "lumora-nest.csv").read_text().splitlines()))
FEW, MORE = 8, 12
SECONDS = 600

pytestmark = pytest.mark.timeout(1800)


def upload(environment: Environment, rows: int) -> None:
    """Put the first rows of the sample under the one key."""
    text = io.StringIO()
    csv.writer(text).writerows(ROWS[: rows + 1])
    environment.store.client().put_object(
        Bucket="datasets", Key="changing.csv", Body=text.getvalue().encode()
    )


@pytest.fixture(scope="module")
def changing(environment: Environment, one_layer: str) -> Iterator[Environment]:
    """A job that looks every minute, on a model of a second."""
    upload(environment, FEW)
    job = yaml.safe_load(EXAMPLE.read_text())
    job["metadata"]["name"] = NAME
    job["spec"] |= {
        "model": {"source": one_layer},
        "dataset": {
            **job["spec"]["dataset"],
            "source": "s3://datasets/changing.csv",
            "refresh": "1m",
        },
        "training": {"epochs": 1, "maxSequenceLength": 256, "seed": 7},
        "export": {"merged": False, "gguf": []},
        "output": {"uri": OUTPUT},
    }
    environment.kubectl("apply", "-f", "-", input=json.dumps(job))
    yield environment
    environment.kubectl("delete", "ftj", NAME)  # or it would look for the rest of the day


def wait(environment: Environment, what: str, happened: Callable[[dict[str, Any]], Any]) -> Any:
    """The job's status as soon as something holds of it."""
    deadline = time.monotonic() + SECONDS
    while True:
        job = environment.get("finetunejob", NAME)
        status = job.get("status", {})
        current = status.get("observedGeneration") == job["metadata"]["generation"]
        if current and happened(status):
            return status
        assert time.monotonic() < deadline, f"{what}: {status}"
        time.sleep(0.5)


def current_version(environment: Environment) -> str:
    """What manifest.json in the output folder names."""
    found = environment.store.client().get_object(Bucket="artifacts", Key="changing/manifest.json")
    return str(json.loads(found["Body"].read())["version"])


def stages_of_pods(environment: Environment) -> dict[str, str]:
    """The stage of each pod of the job, by the pod's uid."""
    pods = environment.items("pods", f"finetune.dev/job={NAME}")
    return {p["metadata"]["uid"]: p["metadata"]["labels"]["finetune.dev/stage"] for p in pods}


def trainings(environment: Environment) -> set[str]:
    """Uids of the pods that trained or exported."""
    pods = environment.items("pods", f"finetune.dev/job={NAME},finetune.dev/stage!=prepare")
    return {pod["metadata"]["uid"] for pod in pods}


def ready(status: dict[str, Any]) -> str:
    return str(next(c for c in status["conditions"] if c["type"] == "Ready")["status"])


def state(status: dict[str, Any], stage: str) -> str:
    """The state of a stage. The phase is no word to wait for: the next look may follow at once."""
    return str(next(each for each in status["stages"] if each["name"] == stage)["state"])


@pytest.fixture(scope="module")
def old(changing: Environment) -> str:
    """The version of the first rows."""
    status = wait(changing, "the first version", lambda status: ready(status) == "True")
    assert status["lineage"]["datasetRows"] == FEW
    return str(status["version"])


@pytest.fixture(scope="module")
def new(changing: Environment, old: str) -> str:
    """The version of more rows, which nobody has edited the spec for."""
    upload(changing, MORE)
    status = wait(changing, "a training", lambda status: state(status, "train") == "Running")
    assert (ready(status), status["version"]) == ("True", old)
    assert current_version(changing) == old
    status = wait(changing, "a new version", lambda status: status["version"] != old)
    return str(status["version"])


def test_new_rows_under_the_same_key_become_a_version_and_the_old_one_stays_until_then(
    changing: Environment, old: str, new: str
) -> None:
    status = wait(changing, "its end", lambda status: status["version"] == new)
    assert current_version(changing) == new
    assert status["lineage"]["datasetRows"] == MORE
    told = [(each["version"], each["state"], each["datasetRows"]) for each in status["versions"]]
    assert told == [(new, "Current", MORE), (old, "Available", FEW)]
    assert all(each["evalLoss"] > 0 for each in status["versions"])


def test_a_look_that_finds_nothing_new_starts_nothing(changing: Environment, new: str) -> None:
    status = wait(changing, "a look", lambda status: state(status, "prepare") == "Succeeded")
    before, looks = trainings(changing), status["planned"]["look"]
    later = wait(
        changing,
        "the next look",
        lambda status: (
            status["planned"]["look"] > looks and state(status, "prepare") == "Succeeded"
        ),
    )
    assert later["lastRefreshTime"] > status["lastRefreshTime"]
    assert later["version"] == new
    assert trainings(changing) == before


def test_back_to_the_old_version_and_forth_without_a_training(
    changing: Environment, old: str, new: str
) -> None:
    before = trainings(changing)
    back = json.dumps({"spec": {"rollbackTo": old}})
    changing.kubectl("patch", "ftj", NAME, "--type=merge", "-p", back)
    status = wait(changing, "the old version", lambda status: status["version"] == old)
    assert current_version(changing) == old
    assert status["lineage"]["datasetRows"] == FEW
    assert "nextRefreshTime" not in status, "nothing is looked at meanwhile"
    assert [each["state"] for each in status["versions"]] == ["Available", "Current"]

    forth = json.dumps({"spec": {"rollbackTo": None}})
    changing.kubectl("patch", "ftj", NAME, "--type=merge", "-p", forth)
    status = wait(changing, "the new version", lambda status: status["version"] == new)
    assert current_version(changing) == new
    assert status["lineage"]["datasetRows"] == MORE
    assert trainings(changing) == before


def test_a_version_that_is_not_there_is_refused_and_the_present_one_stays(
    changing: Environment, old: str, new: str
) -> None:
    missing = json.dumps({"spec": {"rollbackTo": "0123456789ab"}})
    changing.kubectl("patch", "ftj", NAME, "--type=merge", "-p", missing)
    status = wait(changing, "its end", lambda status: status["phase"] == "Failed")
    degraded = next(c for c in status["conditions"] if c["type"] == "Degraded")
    assert degraded["reason"] == "VersionNotFound"
    for version in (old, new):
        assert version in degraded["message"]
    assert (ready(status), status["version"], current_version(changing)) == ("True", new, new)


@pytest.fixture(scope="module")
def with_merged(changing: Environment) -> dict[str, Any]:
    """The status with the merged model; from here on, nobody looks for new data."""
    changes = {"rollbackTo": None, "dataset": {"refresh": None}, "export": {"merged": True}}
    changing.kubectl("patch", "ftj", NAME, "--type=merge", "-p", json.dumps({"spec": changes}))
    done: dict[str, Any] = wait(changing, "its end", lambda status: status["phase"] == "Succeeded")
    return done


def test_another_file_to_export_runs_prepare_and_export(
    changing: Environment, new: str, request: pytest.FixtureRequest
) -> None:
    before = stages_of_pods(changing)
    status = request.getfixturevalue("with_merged")
    ran = [stage for uid, stage in stages_of_pods(changing).items() if uid not in before]
    assert sorted(ran) == ["export", "prepare"]
    assert status["version"] != new
    assert status["lineage"]["datasetRows"] == MORE
    weights = "/merged/model.safetensors"
    (file,) = [each["uri"] for each in status["artifacts"] if each["uri"].endswith(weights)]
    bucket, _, key = file.removeprefix("s3://").partition("/")
    assert changing.store.client().head_object(Bucket=bucket, Key=key)["ContentLength"] > 0
