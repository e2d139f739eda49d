"""Attempts at one training that are killed at random moments, and what each of them did."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from finetune_trainer.contract import RunConfig
from finetune_trainer.contract.fingerprint import digest
from tests.integration.trainer.fork_server import ForkServer

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MOMENTS = ("step", "write", "upload")
VICTIMS = ("worker", "stage", "pod")
SECONDS = 120.0
SETTINGS: dict[str, Any] = {
    "learningRate": 0.002,
    "batchSize": 2,
    "gradientAccumulationSteps": 2,
    "warmupRatio": 0.1,
    "scheduler": "linear",
    "loggingSteps": 1,
    "lora": {"r": 8, "dropout": 0.1},
}


def wait_for(condition: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
    """Look every two milliseconds; AssertionError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.002)


@dataclass
class Training:
    """One output folder in the store, and the command that fills it."""

    server: ForkServer
    client: S3Client
    folder: Path
    config: dict[str, Any]
    environment: dict[str, str]
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def bucket(self) -> str:
        return str(self.config["output"]["uri"]).split("/")[2]

    @property
    def base(self) -> str:
        """Prefix of the stage's objects."""
        prefix = str(self.config["output"]["uri"]).split("/", 3)[3]
        return f"{prefix}/stages/train/{self.config['resolved']['fingerprints']['train']}/"

    def start(self, *, disk: int | None = None, **environment: str) -> Attempt:
        """A further attempt, in an empty pod; `disk` is the size of its disk in bytes."""
        folder = self.folder / f"attempt-{len(self.attempts)}"
        folder.mkdir(parents=True)
        file, workspace = folder / "run.json", folder / "workspace"
        file.write_text(json.dumps(self.config))
        log, termination = folder / "log", folder / "termination-log"
        log.touch()
        arguments = [
            "train",
            f"--config={file}",
            f"--workspace={workspace}",
            f"--termination-log={termination}",
        ]
        workspace.mkdir()
        small = (workspace, disk) if disk else None
        pid = self.server.start(arguments, {**self.environment, **environment}, log, small)
        self.attempts.append(Attempt(self.server, folder, pid))
        return self.attempts[-1]

    def objects(self) -> dict[str, int]:
        """Paths below the stage's folder, with sizes."""
        answer = self.client.list_objects_v2(Bucket=self.bucket, Prefix=self.base)
        return {i["Key"].removeprefix(self.base): i["Size"] for i in answer.get("Contents", [])}

    def read(self, path: str) -> bytes:
        """An object below the stage's folder."""
        return self.client.get_object(Bucket=self.bucket, Key=self.base + path)["Body"].read()

    def checkpoints(self) -> dict[int, bool]:
        """Steps of the checkpoints in the store, and whether each is complete."""
        found: dict[int, bool] = {}
        for path in self.objects():
            if match := re.match(r"checkpoints/(\d+)/(.*)", path):
                step = int(match[1])
                found[step] = found.get(step, False) or match[2] == "complete.json"
        return found

    def newest(self) -> int:
        """Step of the newest whole checkpoint; 0 when there is none."""
        return max((step for step, whole in self.checkpoints().items() if whole), default=0)


@dataclass
class Trainings:
    """Trainings on the same prepared examples, in output folders of their own."""

    server: ForkServer
    client: S3Client
    folder: Path
    config: RunConfig
    environment: dict[str, str]

    def __call__(self, name: str, **settings: Any) -> Training:
        """One with these settings."""
        training = {**SETTINGS, **settings}
        config = RunConfig.model_validate(
            {
                **self.config.model_dump(mode="json"),
                "training": training,
                "output": {"uri": f"{self.config.output.uri}-{name}"},
            }
        )
        resolved = config.resolved
        assert resolved is not None
        prints = resolved.fingerprints.model_copy(update={"train": digest(training)})
        resolved = resolved.model_copy(update={"fingerprints": prints})
        config = config.model_copy(update={"resolved": resolved})
        self._copy_prepared(config.output.uri)
        return Training(
            self.server,
            self.client,
            self.folder / name,
            config.model_dump(mode="json"),
            self.environment,
        )

    def _copy_prepared(self, uri: str) -> None:
        bucket, source = self.config.output.uri.removeprefix("s3://").split("/", 1)
        target = uri.removeprefix(f"s3://{bucket}/")
        answer = self.client.list_objects_v2(Bucket=bucket, Prefix=f"{source}/stages/prepare/")
        for key in (item["Key"] for item in answer["Contents"]):
            copied = target + key.removeprefix(source)
            self.client.copy_object(
                Bucket=bucket, Key=copied, CopySource={"Bucket": bucket, "Key": key}
            )


@dataclass
class Attempt:
    server: ForkServer
    folder: Path
    pid: int

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def result(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads((self.folder / "termination-log").read_bytes())
        return message

    @property
    def steps(self) -> list[int]:
        """Steps that it trained, by its log."""
        return [int(step) for step in re.findall(r" step (\d+)/", self.log)]

    @property
    def began_at(self) -> int:
        """Step that it went on from."""
        match = re.search(r"Going on from step (\d+)", self.log)
        return int(match[1]) if match else 0

    def status(self) -> int | None:
        """Exit status; None while it runs."""
        return self.server.poll(self.pid)

    def wait(self) -> int:
        """Exit status when it has ended."""
        wait_for(lambda: self.status() is not None, f"the end of {self.log}")
        return self.status() or 0

    def wait_for_step(self, step: int) -> None:
        """Return when a step is in the log."""
        wait_for(lambda: self._ended() or max(self.steps, default=0) >= step, f"step {step}")

    def written(self) -> Iterator[Path]:
        """Folders of checkpoints that the worker has begun to write."""
        return (self.folder / "workspace/train/training/trainer").glob("checkpoint-*")

    def worker(self) -> psutil.Process:
        children = psutil.Process(self.pid).children()
        assert len(children) == 1, self.log
        return children[0]

    def kill(self, victim: str) -> None:
        """kill -9, and wait until nothing of it is left."""
        worker = self.worker()
        if victim in ("worker", "pod"):
            worker.kill()
        if victim in ("stage", "pod"):
            os.kill(self.pid, signal.SIGKILL)
        self.wait()
        gone, _ = psutil.wait_procs([worker], timeout=10)
        assert gone, "the worker outlives its stage"

    def _ended(self) -> bool:
        assert self.status() is None, self.log
        return False


def wait_for_moment(training: Training, attempt: Attempt, moment: str, dice: random.Random) -> None:
    """Return somewhere in a step, in the writing of a checkpoint, or in its upload."""
    before = training.checkpoints()
    interval = training.config["training"]["checkpointSteps"]
    written = max(interval // 2, 1)  # steps between two checkpoints
    start = training.newest()
    if moment == "step":
        attempt.wait_for_step(start + dice.randint(1, interval + 1))
        time.sleep(dice.uniform(0, 0.2))
    elif moment == "write":
        attempt.wait_for_step(start + written - 1)
        wait_for(lambda: any(attempt.written()), "a checkpoint on disk")
        time.sleep(dice.uniform(0, 0.02))
    else:
        attempt.wait_for_step(start + written - 1)
        wait_for(lambda: training.checkpoints().keys() - before.keys(), "an upload")
        time.sleep(dice.uniform(0, 0.02))
