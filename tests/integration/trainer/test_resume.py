"""A training that was killed goes on from its last checkpoint, and nobody can tell afterwards.

No more than one interval (training.checkpointSteps) is trained twice, however slow the store is.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from finetune_trainer.contract import RunConfig
from hack.object_store import Credentials
from tests.integration.trainer.conftest import Processes, Trainer, write_csv
from tests.integration.trainer.fork_server import NO_MOUNT
from tests.integration.trainer.killing import (
    MOMENTS,
    VICTIMS,
    Attempt,
    Training,
    Trainings,
    wait_for_moment,
)
from tests.integration.trainer.s3_proxy import Fault, Proxy, Request, s3_proxy

if TYPE_CHECKING:
    pass

INTERVAL = 5
WORDS = ("kettle", "was", "made", "by", "Odalys", "hot", "as", "boiling", "water", "green", "hums")


def make_rows(count: int) -> list[tuple[str, str]]:
    """Questions and answers of very different lengths."""
    dice = random.Random(1)  # noqa: S311
    rows = []
    for number in range(count):
        words = " ".join(dice.choices(WORDS, k=dice.randint(3, 40)))
        rows.append((f"What is {number}?", f"{words}."))
    return rows


@pytest.fixture(scope="module")
def dataset(moto: Credentials, bucket: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """26 rows for training and 6 held out: 7 steps an epoch, the last one of 2 rows."""
    file = tmp_path_factory.mktemp("resume") / "rows.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("instruction", "response"), *make_rows(32)])
    moto.client().upload_file(str(file), bucket, "data/resume.csv")
    return f"s3://{bucket}/data/resume.csv"


@pytest.fixture(scope="module")
def store(moto: Credentials) -> Iterator[Proxy]:
    """The store as the trainings reach it; the tests themselves look into it directly."""
    with s3_proxy(moto.endpoint) as proxy:
        yield proxy


def slowly(wait: Callable[[], object]) -> Callable[[Request], Fault | None]:
    """Each file of a checkpoint waits before it is uploaded."""

    def choose(request: Request) -> Fault | None:
        checkpoint = request.method == "PUT" and "/checkpoints/" in request.path
        return Fault(wait=wait) if checkpoint else None

    return choose


@pytest.fixture(scope="module")
def trainings(
    processes: Processes,
    store: Proxy,
    moto: Credentials,
    dataset: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Trainings:
    folder, bucket = tmp_path_factory.mktemp("trainings"), dataset.split("/")[2]
    keys = {"AWS_ACCESS_KEY_ID": moto.access_key, "AWS_SECRET_ACCESS_KEY": moto.secret_key}
    trainer = Trainer(folder, processes, keys)
    config: dict[str, Any] = {
        "model": {"source": f"s3://{bucket}/models/tiny"},
        "dataset": {"source": dataset, "evalFraction": 0.2},
        "export": {"gguf": [], "merged": False},
        "output": {"uri": f"s3://{bucket}/out/resume"},
        "storage": {"endpoint": store.endpoint},
    }
    prepared = trainer("prepare", config)
    assert prepared.result is not None
    assert prepared.result.resolved is not None, prepared.output
    resolved = prepared.result.resolved.model_copy(update={"plan": None})
    whole = RunConfig.model_validate({**config, "resolved": resolved.model_dump(mode="json")})
    return Trainings(processes.server, moto.client(), folder, whole, trainer.full_environment)


def finish(training: Training) -> dict[str, Any]:
    """Run to the end; returns metrics.json."""
    attempt = training.start()
    assert attempt.wait() == 0, attempt.log
    assert training.checkpoints() == {}, "the checkpoints of a complete training are left"
    metrics: dict[str, Any] = json.loads(training.read("metrics.json"))
    return metrics


def lasting(metrics: dict[str, float]) -> dict[str, float]:
    """Figures that depend neither on the clock nor on how often it was begun."""
    changing = ("trainRuntimeSeconds", "tokensPerSecond", "peakMemoryBytes")
    return {k: v for k, v in metrics.items() if k not in changing}


@pytest.mark.parametrize(
    ("packing", "kills", "epochs"), [(True, 21, 12), (False, 4, 6)], ids=["packed", "padded"]
)
def test_killed_at_random_moments_the_adapter_is_the_uninterrupted_one_bit_for_bit(
    trainings: Trainings, store: Proxy, packing: bool, kills: int, epochs: int
) -> None:
    settings: dict[str, Any] = {"packing": packing, "epochs": epochs, "evalSteps": 6}
    if not packing:  # the best adapter so far has to outlive the kills, too
        settings["earlyStopping"] = {"patience": 100}
    kind = "packed" if packing else "padded"
    whole = trainings(f"whole-{kind}", **settings)
    expected = finish(whole)

    seed = 20 + packing
    dice = random.Random(seed)  # noqa: S311
    print(f"seed {seed}")
    kinds = list(itertools.product(MOMENTS, VICTIMS))
    dice.shuffle(kinds)
    killed = trainings(f"killed-{kind}", **settings, checkpointSteps=INTERVAL)
    twice, cut_off = 0, Counter[str]()
    for number, (moment, victim) in enumerate(itertools.islice(itertools.cycle(kinds), kills)):
        # Every third time, an upload takes longer than an interval.
        store.choose = slowly(lambda: time.sleep(0.2)) if number % 3 == 2 else lambda _: None
        attempt = killed.start()
        wait_for_moment(killed, attempt, moment, dice)
        attempt.kill(victim)
        if victim == "worker":
            assert attempt.result["reason"] == "InternalError", "it may be tried again"
        reached, newest = max(attempt.steps, default=attempt.began_at), killed.newest()
        print(f"{moment:6} {victim:6} {attempt.began_at} -> {reached}, goes on from {newest}")
        assert reached - newest <= INTERVAL
        twice += max(reached - newest, 0)
        cut_off["uploads"] += not all(killed.checkpoints().values())
        cut_off["writes"] += any(
            not (folder / "trainer_state.json").exists() for folder in attempt.written()
        )
    print(f"{twice} steps trained twice after {kills} kills; cut off: {dict(cut_off)}")
    if kills > len(kinds):
        assert cut_off["uploads"] > 0
        assert cut_off["writes"] > 0

    store.choose = lambda _: None
    assert killed.newest() > 0
    found = finish(killed)
    for before, after in itertools.pairwise(killed.attempts):
        assert after.began_at >= before.began_at
    assert killed.attempts[-1].result["notices"][0]["code"] == "Resumed"
    assert found["history"] == expected["history"]
    assert lasting(found["metrics"]) == lasting(expected["metrics"])
    adapter = "adapter/adapter_model.safetensors"
    assert killed.read(adapter) == whole.read(adapter)


def test_sigterm_saves_the_step_that_runs_and_the_next_attempt_goes_on_from_it(
    trainings: Trainings,
) -> None:
    training = trainings("stopped", epochs=8)
    expected = finish(trainings("not-stopped", epochs=8))
    attempt = training.start()
    attempt.wait_for_step(4)
    began = time.monotonic()
    for _ in range(3):  # impatience changes nothing
        os.kill(attempt.pid, signal.SIGTERM)
        time.sleep(0.05)
    assert attempt.wait() == 14, attempt.log
    assert time.monotonic() - began < 24
    step = training.newest()
    assert attempt.steps[-1] == step >= 4
    assert training.checkpoints() == {step: True}
    assert attempt.result["reason"] == "Stopped"
    assert attempt.result["message"] == (
        f"Stopped by a signal; the next attempt goes on from step {step}."
    )

    found = finish(training)
    assert training.attempts[-1].steps[0] == step + 1
    assert found["history"] == expected["history"]
    assert lasting(found["metrics"]) == lasting(expected["metrics"])
    assert found["notices"] == [
        {
            "code": "Resumed",
            "step": step,
            "evidence": "an earlier attempt left a checkpoint of this step",
            "remedy": f"Going on from step {step}.",
        }
    ]


def test_no_step_begins_an_interval_ahead_of_a_store_that_does_not_keep_up(
    trainings: Trainings, store: Proxy
) -> None:
    settings: dict[str, Any] = {"epochs": 4, "checkpointSteps": 6}
    expected = finish(trainings("kept-up", **settings))
    training, gate = trainings("behind", **settings), threading.Event()
    store.choose = slowly(gate.wait)
    for _ in range(2):
        attempt = training.start()
        attempt.wait_for_step(6)
        time.sleep(1)  # in which a few more steps would be done
        assert attempt.steps[-1] == 6
        assert attempt.began_at == 0
        attempt.kill("pod")
        assert training.newest() == 0

    attempt = training.start()
    attempt.wait_for_step(6)
    os.kill(attempt.pid, signal.SIGTERM)  # while it waits
    gate.set()
    assert attempt.wait() == 14, attempt.log
    assert training.newest() == attempt.steps[-1] == 6
    found = finish(training)
    assert training.attempts[-1].began_at == 6
    assert found["history"] == expected["history"]
    assert lasting(found["metrics"]) == lasting(expected["metrics"])


def test_a_step_longer_than_the_grace_period_is_given_up(trainings: Trainings) -> None:
    training = trainings("frozen", epochs=8, checkpointSteps=6)
    attempt = training.start(FINETUNE_GRACE_SECONDS="5")
    attempt.wait_for_step(5)
    worker = attempt.worker()
    worker.suspend()
    newest = training.newest()
    began = time.monotonic()
    os.kill(attempt.pid, signal.SIGTERM)
    assert attempt.wait() == 14, attempt.log
    assert time.monotonic() - began < 5
    assert psutil.wait_procs([worker], timeout=10)[0], "the worker outlives its stage"
    assert newest == 3
    assert attempt.result["message"] == (
        "Stopped by a signal; the step that ran did not end within the grace period; "
        "the next attempt goes on from step 3."
    )


def test_a_damaged_checkpoint_is_passed_over_and_another_trainings_is_never_used(
    trainings: Trainings,
) -> None:
    training = trainings("damaged", epochs=8, checkpointSteps=6)
    attempt = training.start()
    attempt.wait_for_step(8)
    attempt.kill("pod")
    assert sorted(training.checkpoints()) == [3, 6]
    key = f"{training.base}checkpoints/6/optimizer.pt"
    data = bytearray(training.read("checkpoints/6/optimizer.pt"))
    data[len(data) // 2] ^= 1
    training.client.put_object(Bucket=training.bucket, Key=key, Body=bytes(data))

    attempt = training.start()
    attempt.wait_for_step(4)
    attempt.kill("pod")
    assert "checkpoints/6 is passed over: optimizer.pt is not what was written" in attempt.log
    assert attempt.began_at == 3

    marker = json.loads(training.read("checkpoints/3/complete.json"))
    other = json.dumps({**marker, "fingerprint": "0" * 64}).encode()
    key = f"{training.base}checkpoints/3/complete.json"
    training.client.put_object(Bucket=training.bucket, Key=key, Body=other)
    attempt = training.start()
    attempt.wait_for_step(1)
    attempt.kill("pod")
    assert "checkpoints/3 is passed over: it is one of another training" in attempt.log
    assert attempt.began_at == 0


def test_a_disk_too_small_for_a_checkpoint_is_named_with_a_remedy(trainings: Trainings) -> None:
    training = trainings("small-disk", epochs=8, checkpointSteps=1)
    attempt = training.start(disk=12 << 20)
    code = attempt.wait()
    if code == NO_MOUNT:
        pytest.skip("no disk can be mounted here")
    assert code == 13, attempt.log
    assert attempt.result["reason"] == "OutOfDisk"
    assert re.fullmatch(
        r"The disk is full: the checkpoint of step \d can't be written\. Give the training's pod "
        r"more ephemeral storage: three checkpoints.* have to fit beside the base model\.",
        attempt.result["message"],
    )


def test_ctrl_c_on_one_machine_and_the_same_command_again(
    trainings: Trainings, tiny_model: Path
) -> None:
    folder = trainings.folder / "local"
    folder.mkdir()
    write_csv(folder / "my.csv", make_rows(24))
    arguments = [
        "local",
        "train",
        f"--dataset={folder / 'my.csv'}",
        f"--base-model={tiny_model}",
        f"--output={folder / 'models'}",
        "--epochs=8",
        "--set=training.gradientAccumulationSteps=1",
        "--set=training.loggingSteps=1",
    ]

    def start() -> Attempt:
        pid = trainings.server.start(arguments, trainings.environment, folder / "log")
        return Attempt(trainings.server, folder, pid)

    (folder / "log").touch()
    attempt = start()
    attempt.wait_for_step(3)
    os.kill(attempt.pid, signal.SIGINT)
    assert attempt.wait() == 14, attempt.log
    stopped_at = attempt.steps[-1]
    assert f"the next attempt goes on from step {stopped_at}" in attempt.log

    attempt = start()
    assert attempt.wait() == 0, attempt.log
    assert attempt.began_at == stopped_at
    assert attempt.steps == list(range(1, attempt.steps[-1] + 1))
    assert (folder / "models/lora_adapter/adapter_model.safetensors").exists()


def test_a_worker_that_hangs_is_ended_and_says_where_it_was(
    trainings: Trainings, store: Proxy
) -> None:
    training, gate = (
        trainings("hung", epochs=6, checkpointSteps=4, stallTimeout="5s"),
        threading.Event(),
    )
    store.choose = slowly(gate.wait)
    attempt = training.start()
    attempt.wait_for_step(4)
    time.sleep(7)  # it waits for the store, and says so
    assert attempt.status() is None, attempt.log
    worker = attempt.worker()
    # It hangs in the writing of its next checkpoint: nobody reads what it opens there.
    hole = next(iter(attempt.written())).with_name("checkpoint-6")
    hole.mkdir()
    os.mkfifo(hole / "trainer_state.json")
    gate.set()
    assert attempt.wait() == 1, attempt.log
    assert not worker.is_running()
    assert attempt.result["reason"] == "Stalled"
    assert "5s" in attempt.result["message"]
    assert "spec.training.stallTimeout" in attempt.result["message"]
    assert "Current thread 0x" in attempt.log
    for file in ("sft.py", "reporter.py"):  # of its main thread, and of another one
        assert f'{file}", line' in attempt.log
    assert training.newest() == 4
    finish(training)
    assert training.attempts[-1].began_at == 4
