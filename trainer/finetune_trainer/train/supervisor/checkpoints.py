"""Checkpoints in the object store: whole or not at all, and only of the very same training.

    stages/train/<fingerprint>/checkpoints/<step>/…               what the worker wrote
    stages/train/<fingerprint>/checkpoints/<step>/complete.json   last: a CheckpointMarker

A checkpoint counts when its marker is there, names this fingerprint, and every file has the size
and the SHA-256 that the marker says. A marker is deleted before any of its files changes.

A thread uploads them beside the training (see recipe.saving).
"""

from __future__ import annotations

import errno
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, ValidationError

from finetune_trainer.contract import Artifact, Base, Reason, Stage, StageError, TrainingPlan
from finetune_trainer.store import Folder, stays_below
from finetune_trainer.store.marker import describe_file, stage_folder

COMPLETE = "complete.json"
KEPT = 2  # checkpoints in the store: the newest, and one more in case that it is damaged
# What a resume reads. The Trainer also writes the tokenizer's files and its pickled arguments.
_RESUMED_FROM = ("*.safetensors", "*.pt", "*.pth", "adapter_config.json", "trainer_state.json")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

log = logging.getLogger(__name__)


def _check_paths(files: tuple[Artifact, ...]) -> tuple[Artifact, ...]:
    for file in files:
        if not stays_below(file.path):
            raise ValueError(f"{file.path!r} leaves the folder")
    return files


class CheckpointMarker(Base):
    """What complete.json holds."""

    model_config = ConfigDict(extra="ignore")

    step: int
    """Optimizer steps that are done."""

    fingerprint: str
    """Of the training."""

    plan: TrainingPlan
    """How the steps were split when it was written, e.g. after GPU memory had run out."""

    max_sequence_length: int
    """Tokens; less than the spec's after it was shortened for want of memory."""

    files: Annotated[tuple[Artifact, ...], AfterValidator(_check_paths)]
    """Paths below the folder that the marker lies in."""


@dataclass(frozen=True)
class LocalCheckpoint:
    """A complete checkpoint on disk."""

    step: int
    folder: Path
    plan: TrainingPlan
    max_sequence_length: int


class UnusableCheckpointError(Exception):
    """A checkpoint can't be used. The text says why."""


ResumeObstacle = Callable[[CheckpointMarker], str | None]
"""Why a checkpoint can't be used here, or None."""


class CheckpointStore:
    """The checkpoints of one training. Methods raise StageError and OSError like a Folder's."""

    def __init__(self, output: Folder, fingerprint: str) -> None:
        self._output = output
        self._fingerprint = fingerprint
        self._base = f"{stage_folder(Stage.TRAIN, fingerprint)}/checkpoints"

    def fetch_newest(
        self, target: Path, obstacle: ResumeObstacle = lambda _: None
    ) -> CheckpointMarker | None:
        """Copy the newest usable checkpoint to the folder `target`.

        It passes over what is damaged, with a warning. A store that doesn't answer has none. One
        that denies access raises StageError, as it would for the result.
        """
        try:
            steps = self._complete_steps()
        except StageError as error:
            if error.reason is not Reason.STORAGE_UNAVAILABLE:
                raise
            log.warning("No checkpoint can be looked for, the training starts anew: %s", error)
            return None
        for step in sorted(steps, reverse=True):
            try:
                return self._fetch(step, target, obstacle)
            except UnusableCheckpointError as error:
                shutil.rmtree(target, ignore_errors=True)
                uri = self._output.uri_of(f"{self._base}/{step}")
                log.warning("The checkpoint %s is passed over: %s", uri, error)
        return None

    def save(self, checkpoint: LocalCheckpoint) -> None:
        """Upload what a resume needs of a checkpoint, the marker last."""
        files = tuple(describe_file(file, file.name) for file in files_to_resume(checkpoint.folder))
        base = f"{self._base}/{checkpoint.step}"
        self._output.delete([f"{base}/{COMPLETE}"])  # of an earlier attempt
        for item in files:
            source = checkpoint.folder / item.path
            self._output.upload(source, f"{base}/{item.path}", sha256=item.sha256)
        marker = CheckpointMarker(
            step=checkpoint.step,
            fingerprint=self._fingerprint,
            plan=checkpoint.plan,
            max_sequence_length=checkpoint.max_sequence_length,
            files=files,
        )
        self._output.write(f"{base}/{COMPLETE}", marker.model_dump_json(indent=2).encode())

    def prune(self, newest: int) -> None:
        """Delete all but the last ones up to the step `newest`.

        Those of later steps were passed over as damaged, or nothing would have been trained again.
        """
        earlier = [step for step in self._complete_steps() if step < newest]
        keep = {newest, *sorted(earlier)[-(KEPT - 1) :]}
        self._delete(step for step in self._steps() if step not in keep)

    def clear(self) -> None:
        """Delete all of them, and what interrupted uploads left."""
        self._delete(self._steps())
        self._output.abandon(f"{self._base}/")

    def _fetch(self, step: int, target: Path, obstacle: ResumeObstacle) -> CheckpointMarker:
        checkpoint = self._read(step)
        if why := obstacle(checkpoint):
            raise UnusableCheckpointError(why)
        for item in checkpoint.files:
            path = f"{self._base}/{step}/{item.path}"
            try:
                self._output.download(path, target / item.path)
            except FileNotFoundError as error:
                raise UnusableCheckpointError(f"{item.path} is missing") from error
            except StageError as error:
                if error.reason is not Reason.STORAGE_UNAVAILABLE:
                    raise
                raise UnusableCheckpointError(error.message) from error
            except OSError as error:
                if error.errno in _DISK_FULL:
                    raise
                raise UnusableCheckpointError(str(error)) from error
            if describe_file(target / item.path, item.path) != item:
                raise UnusableCheckpointError(f"{item.path} is not what was written")
        return checkpoint

    def _read(self, step: int) -> CheckpointMarker:
        data = self._output.read(f"{self._base}/{step}/{COMPLETE}")
        try:
            checkpoint = CheckpointMarker.model_validate_json(data or b"")
        except ValidationError as error:
            raise UnusableCheckpointError(f"{COMPLETE} is no marker of this version") from error
        if (checkpoint.fingerprint, checkpoint.step) != (self._fingerprint, step):
            raise UnusableCheckpointError(f"it is one of another training (step {checkpoint.step})")
        return checkpoint

    def _steps(self) -> list[int]:
        return sorted({step for step, _ in self._listing()})

    def _complete_steps(self) -> list[int]:
        return [step for step, name in self._listing() if name == COMPLETE]

    def _listing(self) -> list[tuple[int, str]]:
        found = []
        for info in self._output.list(f"{self._base}/"):
            step, _, name = info.path.removeprefix(f"{self._base}/").partition("/")
            if step.isdecimal():
                found.append((int(step), name))
        return found

    def _delete(self, steps: Iterable[int]) -> None:
        gone = {f"{self._base}/{step}/" for step in steps}
        paths = [info.path for info in self._output.list(f"{self._base}/")]
        doomed = [path for path in paths if any(path.startswith(base) for base in gone)]
        self._output.delete(path for path in doomed if path.endswith(f"/{COMPLETE}"))
        self._output.delete(path for path in doomed if not path.endswith(f"/{COMPLETE}"))


def files_to_resume(folder: Path) -> list[Path]:
    """The files of a checkpoint that a resume reads."""
    return sorted(file for pattern in _RESUMED_FROM for file in folder.glob(pattern))


class CheckpointUploader:
    """Brings the newest checkpoint to the store, and leaves out an older one that still waits.

    On disk it keeps the newest one, for a worker that starts again on this machine.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._changed = threading.Condition()
        self._waiting: LocalCheckpoint | None = None
        self._uploading: LocalCheckpoint | None = None
        self._closing = False
        self._done_with: Callable[[int], None] = lambda _: None
        self._thread = threading.Thread(target=self._loop, name="checkpoints", daemon=True)
        self.newest: LocalCheckpoint | None = None
        """The newest complete checkpoint on disk."""

        self.stored: int | None = None
        """Step of the newest checkpoint in the store."""

        self.seconds = 0.0
        """What the last upload took."""

    def start(
        self,
        fetched: LocalCheckpoint | None = None,
        done_with: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Begin. `fetched` is what was found in the store.

        `done_with` is told the step of each checkpoint that is stored or can't be stored. It is
        first called at once: with the step of what was fetched, or 0.
        """
        if fetched:
            self.newest, self.stored = fetched, fetched.step
        self._done_with = done_with
        self._done_with(self.stored or 0)
        self._thread.start()

    def offer(self, checkpoint: LocalCheckpoint) -> None:
        """Upload a further checkpoint, which is complete on disk."""
        with self._changed:
            if checkpoint == self.newest:
                return
            before, self.newest = self.newest, checkpoint
            self._waiting = checkpoint
            self._changed.notify_all()
            if before and before != self._uploading:
                self._remove(before)

    def finish(self, deadline: float) -> int | None:
        """Wait until everything is in the store, or until the deadline. Returns `stored`.

        It tries once more what could not be uploaded before.
        """
        with self._changed:
            newest = self.newest
            idle = self._waiting is None and self._uploading is None
            if newest and idle and newest.step != self.stored:
                self._waiting = newest
                self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._waiting is None and self._uploading is None,
                timeout=max(deadline - time.monotonic(), 0),
            )
            return self.stored

    def close(self) -> None:
        """Finish the upload in progress, and begin none that waits."""
        with self._changed:
            self._closing = True
            self._waiting = None
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _loop(self) -> None:
        while checkpoint := self._take():
            began = time.monotonic()
            stored = self._upload(checkpoint)
            with self._changed:
                if stored:
                    self.stored = checkpoint.step
                    self.seconds = time.monotonic() - began
                self._uploading = None
                if self.newest is not checkpoint:
                    self._remove(checkpoint)
                self._changed.notify_all()
            self._done_with(checkpoint.step)
            if stored:
                self._prune(checkpoint.step)

    def _take(self) -> LocalCheckpoint | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._closing)
            self._uploading, self._waiting = self._waiting, None
            return self._uploading

    def _upload(self, checkpoint: LocalCheckpoint) -> bool:
        try:
            self._store.save(checkpoint)
        except Exception as error:  # whatever it is: the training may wait for this thread
            log.warning(
                "The checkpoint of step %d is not in the store, the training goes on: %s",
                checkpoint.step,
                error,
            )
            return False
        log.info("Checkpoint of step %d saved", checkpoint.step)
        return True

    def _prune(self, newest: int) -> None:
        try:
            self._store.prune(newest)
        except (StageError, OSError) as error:
            log.warning("Older checkpoints stay in the store: %s", error)

    def _remove(self, checkpoint: LocalCheckpoint) -> None:
        if self.newest is None or self.newest.folder != checkpoint.folder:
            shutil.rmtree(checkpoint.folder, ignore_errors=True)
