"""The uploader: it works beside the training, and only the newest checkpoint matters."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_trainer.contract import Reason, RunConfig, StageError, TrainingPlan
from finetune_trainer.model import ModelFolder
from finetune_trainer.store import LocalFolder
from finetune_trainer.train.link import TrainingWork
from finetune_trainer.train.supervisor.checkpoints import (
    CheckpointMarker,
    CheckpointStore,
    CheckpointUploader,
    LocalCheckpoint,
)
from finetune_trainer.train.supervisor.training_session import (
    plan_to_resume_with,
    resume_obstacle,
    resumed_from,
)

PLAN = TrainingPlan(batch_size=2, gradient_accumulation_steps=4, gradient_checkpointing=False)
SECONDS = 10.0


class Store(CheckpointStore):
    """A real store whose uploads wait at a gate, and fail on demand."""

    def __init__(self, root: Path) -> None:
        super().__init__(LocalFolder(root), "abc")
        self.begun = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)
        self.error: StageError | None = None
        self.steps: list[int] = []

    def save(self, checkpoint: LocalCheckpoint) -> None:
        self.steps.append(checkpoint.step)
        self.begun.release()
        assert self.gate.acquire(timeout=SECONDS)
        if self.error:
            raise self.error
        super().save(checkpoint)

    def open(self) -> None:
        self.gate.release(100)

    def wait(self) -> None:
        """Until an upload has begun."""
        assert self.begun.acquire(timeout=SECONDS)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def uploader(store: Store) -> Iterator[CheckpointUploader]:
    uploader = CheckpointUploader(store)
    uploader.start()
    yield uploader
    store.open()
    uploader.close()


def local(workdir: Path, step: int, plan: TrainingPlan = PLAN) -> LocalCheckpoint:
    folder = workdir / f"checkpoint-{step}"
    folder.mkdir(exist_ok=True)
    (folder / "optimizer.pt").write_text(str(step))
    return LocalCheckpoint(step, folder, plan, 512)


def on_disk(workdir: Path) -> set[int]:
    return {int(path.name.partition("-")[2]) for path in workdir.glob("checkpoint-*")}


def soon() -> float:
    return time.monotonic() + SECONDS


def test_offers_return_at_once_and_older_ones_that_wait_are_left_out(
    uploader: CheckpointUploader, store: Store, tmp_path: Path
) -> None:
    uploader.offer(local(tmp_path, 10))
    store.wait()
    for step in (20, 30, 40):
        uploader.offer(local(tmp_path, step))
    assert on_disk(tmp_path) == {10, 40}, "those that nobody will upload only take space"
    store.open()
    assert uploader.finish(soon()) == 40
    assert store.steps == [10, 40]
    assert on_disk(tmp_path) == {40}, "the newest stays for a worker that starts again"


def test_a_failed_upload_is_a_warning_and_the_next_checkpoint_tries_again(
    uploader: CheckpointUploader, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.open()
    store.error = StageError(Reason.STORAGE_UNAVAILABLE, "The store answered 503.")
    uploader.offer(local(tmp_path, 10))
    store.wait()
    assert uploader.finish(soon()) is None
    assert "step 10 is not in the store, the training goes on: The store answered" in caplog.text
    store.error = None
    uploader.offer(local(tmp_path, 20))
    assert uploader.finish(soon()) == 20


def test_the_training_hears_of_each_checkpoint_that_is_done_with(
    store: Store, tmp_path: Path
) -> None:
    """It may wait for that, so also of one that can't be stored, for whatever reason."""
    heard: list[int] = []
    uploader = CheckpointUploader(store)
    uploader.start(local(tmp_path, 5), heard.append)
    assert heard == [5], "what was fetched is in the store"
    uploader.offer(local(tmp_path, 10))
    store.wait()
    assert heard == [5]
    store.open()
    uploader.finish(soon())
    store.error = StageError(Reason.STORAGE_UNAVAILABLE, "The store answered 503.")
    uploader.offer(local(tmp_path, 20))
    uploader.finish(soon())
    store.save = None  # type: ignore[assignment, method-assign]  # a fault that nobody foresaw
    uploader.offer(local(tmp_path, 30))
    uploader.finish(soon())
    uploader.close()
    assert list(dict.fromkeys(heard)) == [5, 10, 20, 30]
    assert uploader.stored == 10


def test_the_end_tries_once_more_what_could_not_be_uploaded(
    uploader: CheckpointUploader, store: Store, tmp_path: Path
) -> None:
    store.open()
    store.error = StageError(Reason.STORAGE_UNAVAILABLE, "The store answered 503.")
    uploader.offer(local(tmp_path, 10))
    uploader.finish(soon())
    store.error = None
    assert uploader.finish(soon()) == 10


def test_the_end_waits_no_longer_than_it_may(
    uploader: CheckpointUploader, store: Store, tmp_path: Path
) -> None:
    uploader.offer(local(tmp_path, 10))
    store.wait()
    began = time.monotonic()
    assert uploader.finish(began + 0.1) is None
    assert time.monotonic() - began < 5


def test_the_same_step_under_another_plan_is_uploaded_again(
    uploader: CheckpointUploader, store: Store, tmp_path: Path
) -> None:
    store.open()
    halved = PLAN.model_copy(update={"batch_size": 1, "gradient_accumulation_steps": 8})
    uploader.offer(local(tmp_path, 10))
    uploader.finish(soon())
    uploader.offer(local(tmp_path, 10))
    uploader.offer(local(tmp_path, 10, halved))
    assert uploader.finish(soon()) == 10
    assert store.steps == [10, 10]
    assert on_disk(tmp_path) == {10}
    found = store.fetch_newest(tmp_path / "fetched")
    assert found is not None
    assert found.plan == halved


def test_the_plan_in_force_goes_on_unless_the_devices_are_others() -> None:
    def plan(rows: int, passes: int, parallelism: str = "none") -> TrainingPlan:
        return TrainingPlan.model_validate(
            {
                "batchSize": rows,
                "gradientAccumulationSteps": passes,
                "gradientCheckpointing": False,
                "parallelism": parallelism,
            }
        )

    planned = plan(2, 4)
    assert plan_to_resume_with(plan(1, 8), planned) == plan(1, 8)
    assert plan_to_resume_with(plan(1, 4, "ddp"), planned) == planned
    assert plan_to_resume_with(plan(1, 4), planned) == planned, "another effective batch"
    assert plan_to_resume_with(plan(4, 2), planned) == planned, (
        "an earlier attempt had a larger GPU"
    )
    recomputing = planned.model_copy(update={"gradient_checkpointing": True})
    more = planned.model_copy(update={"pass_tokens": 4096})
    assert plan_to_resume_with(more, planned) == planned, "too many tokens a pass"
    assert plan_to_resume_with(planned, more) == planned
    assert plan_to_resume_with(planned, recomputing) == recomputing
    assert plan_to_resume_with(recomputing, planned) == recomputing
    half = recomputing.model_copy(update={"recompute_every": 2})
    assert plan_to_resume_with(half, recomputing) == recomputing
    assert plan_to_resume_with(recomputing, half) == recomputing

    def checkpoint(saved: TrainingPlan) -> CheckpointMarker:
        return CheckpointMarker(
            step=1, fingerprint="a", plan=saved, max_sequence_length=16, files=()
        )

    assert resume_obstacle(checkpoint(plan(1, 4, "ddp")), planned) is None
    assert resume_obstacle(checkpoint(plan(1, 4, "fsdp")), plan(2, 2, "fsdp")) is None
    sharded = resume_obstacle(checkpoint(plan(1, 4, "fsdp")), planned)
    assert sharded == "it was written with parallelism fsdp, and this is none"


def test_a_resumed_work_keeps_what_the_ladder_has_changed(tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {
            "model": {"source": "org/model"},
            "dataset": {"source": "/d.csv"},
            "output": {"uri": "/out"},
        }
    )
    work = TrainingWork(
        config=config,
        plan=PLAN,
        max_sequence_length=1024,
        engine="transformers",
        examples=tmp_path,
        held_out=None,
        model=ModelFolder(tmp_path),
        workdir=tmp_path,
    )
    halved = PLAN.model_copy(update={"batch_size": 1, "gradient_accumulation_steps": 8})
    resumed = resumed_from(work, LocalCheckpoint(7, tmp_path / "resumed", halved, 512))
    assert (resumed.plan, resumed.max_sequence_length) == (halved, 512)
    assert resumed.resume_from == tmp_path / "resumed"
