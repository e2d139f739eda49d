"""Checkpoints in the object store: whole or not at all, and only of the very same training.

    stages/train/<fingerprint>/checkpoints/<step>/…               what the worker wrote
    stages/train/<fingerprint>/checkpoints/<step>/complete.json   last: a Checkpoint

A checkpoint counts when its marker is there, names this fingerprint, and every file has the size
and the SHA-256 that the marker says. A marker is deleted before any of its files changes.
"""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, ValidationError

from finetune_trainer.contract import Artifact, Base, Reason, Stage, StageError, TrainingPlan
from finetune_trainer.store import Folder
from finetune_trainer.store.marker import describe_file, stage_folder, stays_below

COMPLETE = "complete.json"
KEPT = 2  # checkpoints in the store: the newest, and one more in case that it is damaged
# What a resume reads. The Trainer also writes the tokenizer's files and its pickled arguments.
_SUFFIXES = {".safetensors", ".pt", ".pth"}
_NAMES = {"adapter_config.json", "trainer_state.json"}
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

log = logging.getLogger(__name__)


def _check_paths(files: tuple[Artifact, ...]) -> tuple[Artifact, ...]:
    for file in files:
        if not stays_below(file.path):
            raise ValueError(f"{file.path!r} leaves the folder")
    return files


class Checkpoint(Base):
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


class UnusableError(Exception):
    """A checkpoint can't be used; the text says why."""


Refuse = Callable[[Checkpoint], str | None]
"""Why a checkpoint can't be used here, or None."""


class CheckpointStore:
    """The checkpoints of one training. Methods raise StageError and OSError like a Folder's."""

    def __init__(self, output: Folder, fingerprint: str) -> None:
        self._output = output
        self._fingerprint = fingerprint
        self._base = f"{stage_folder(Stage.TRAIN, fingerprint)}/checkpoints"

    def fetch_newest(self, target: Path, refuse: Refuse = lambda _: None) -> Checkpoint | None:
        """Copy the newest usable checkpoint to the folder `target`.

        What is damaged is passed over with a warning. A store that doesn't answer has none; one
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
                return self._fetch(step, target, refuse)
            except UnusableError as error:
                shutil.rmtree(target, ignore_errors=True)
                uri = self._output.uri_of(f"{self._base}/{step}")
                log.warning("The checkpoint %s is passed over: %s", uri, error)
        return None

    def save(self, folder: Path, step: int, plan: TrainingPlan, max_sequence_length: int) -> None:
        """Upload what a resume needs of a folder, the marker last."""
        files = tuple(
            describe_file(file, file.relative_to(folder).as_posix()) for file in needed(folder)
        )
        base = f"{self._base}/{step}"
        self._output.delete([f"{base}/{COMPLETE}"])  # of an earlier attempt
        for item in files:
            self._output.upload(folder / item.path, f"{base}/{item.path}", sha256=item.sha256)
        marker = Checkpoint(
            step=step,
            fingerprint=self._fingerprint,
            plan=plan,
            max_sequence_length=max_sequence_length,
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

    def _fetch(self, step: int, target: Path, refuse: Refuse) -> Checkpoint:
        checkpoint = self._read(step)
        if why := refuse(checkpoint):
            raise UnusableError(why)
        for item in checkpoint.files:
            path = f"{self._base}/{step}/{item.path}"
            try:
                self._output.download(path, target / item.path)
            except FileNotFoundError as error:
                raise UnusableError(f"{item.path} is missing") from error
            except StageError as error:
                if error.reason is not Reason.STORAGE_UNAVAILABLE:
                    raise
                raise UnusableError(error.message) from error
            except OSError as error:
                if error.errno in _DISK_FULL:
                    raise
                raise UnusableError(str(error)) from error
            if describe_file(target / item.path, item.path) != item:
                raise UnusableError(f"{item.path} is not what was written")
        return checkpoint

    def _read(self, step: int) -> Checkpoint:
        data = self._output.read(f"{self._base}/{step}/{COMPLETE}")
        try:
            checkpoint = Checkpoint.model_validate_json(data or b"")
        except ValidationError as error:
            raise UnusableError(f"{COMPLETE} is no marker of this version") from error
        if (checkpoint.fingerprint, checkpoint.step) != (self._fingerprint, step):
            raise UnusableError(f"it is one of another training (step {checkpoint.step})")
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


def needed(folder: Path) -> list[Path]:
    """The files of a checkpoint that a resume reads."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and (file.suffix in _SUFFIXES or file.name in _NAMES)
    )
