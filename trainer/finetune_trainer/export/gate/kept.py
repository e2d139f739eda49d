"""What an export has measured so far, kept in the store, so that a retry goes on from there.

It lies in `stages/export/<fingerprint>/` beside the record of uploads, and goes with it when the
version stands: the figures and the verdict on each file (gate.json), and what files are compared
with (log-probabilities, importance matrix). What was measured otherwise, by another release or on
other rows, is forgotten.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import ConfigDict, ValidationError

from finetune_trainer.contract import (
    Artifact,
    Base,
    Export,
    FileVerdict,
    Sample,
    Stage,
    digest,
)
from finetune_trainer.export.gate.rows import BLOCK_TOKENS, MeasuredRows
from finetune_trainer.export.reference import ReferenceAnswer
from finetune_trainer.store import Folder
from finetune_trainer.store.marker import describe_file, stage_folder

FIGURES = "gate.json"
_MEASURES = ("finetune-operator", "llama-cpp-python", "transformers", "peft", "torch")

log = logging.getLogger(__name__)


class KeptFile(Base):
    """A file that was checked."""

    model_config = ConfigDict(extra="ignore")

    artifact: Artifact
    """Where it is in the version's folder; its bare name where it isn't published."""

    verdict: FileVerdict | None = None
    alike: tuple[bool, ...] = ()
    """Of the source file: whether llama.cpp splits each row as the training did."""


class Figures(Base):
    """The whole of gate.json."""

    model_config = ConfigDict(extra="ignore")

    key: str = ""
    """A digest of what the figures depend on beside the export's fingerprint."""

    reference: ReferenceAnswer | None = None
    files: dict[str, KeptFile] = {}
    """By path in the version's folder, but for rejected/; by name where it isn't published."""

    folders: dict[str, tuple[str, ...]] = {}
    """Folders of which all files were made, with the keys of `files`."""

    samples: tuple[Sample, ...] | None = None
    beside: dict[str, str] = {}
    """SHA-256 of the files beside it, by name."""


def key_of(rows: MeasuredRows, export: Export) -> str:
    """What figures depend on: the rows, the limits, and the programs that measure.

    The model itself is in the fingerprint of the export.
    """
    versions = {name: _version(name) for name in _MEASURES}
    limits = export.model_dump(mode="json", include={"verify", "quality_limits"})
    measured = [asdict(row) for row in rows.measured]
    return digest([versions, limits, measured, rows.full_ids, rows.examples, BLOCK_TOKENS])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


class KeptFigures:
    """Figures of one export; without an output folder nothing is kept."""

    def __init__(self, output: Folder | None = None, fingerprint: str = "") -> None:
        self._output = output
        self._folder = stage_folder(Stage.EXPORT, fingerprint)
        self._found = Figures()

    def expect(self, key: str) -> None:
        """Read what is there, unless it was measured otherwise."""
        self._found = self._read()
        if self._found.key != key:
            self._found = Figures(key=key)

    @property
    def reference(self) -> ReferenceAnswer | None:
        return self._found.reference

    @property
    def samples(self) -> tuple[Sample, ...] | None:
        return self._found.samples

    def file(self, name: str) -> KeptFile | None:
        """What was found out about a file of that path, whether it is still the same or not."""
        return self._found.files.get(name)

    def of(self, name: str, file: Path) -> KeptFile | None:
        """What was found out about this very file."""
        kept = self.file(name)
        if kept is None or describe_file(file, name).sha256 != kept.artifact.sha256:
            return None
        log.info("%s was checked by an earlier attempt", file.name)
        return kept

    def folder(self, name: str) -> tuple[KeptFile, ...]:
        """All files of a folder; empty where not all were made."""
        return tuple(self._found.files[path] for path in self._found.folders.get(name, ()))

    def add_reference(self, answer: ReferenceAnswer, files: Sequence[Path]) -> None:
        """Keep what the models predict, `files` of log-probabilities included."""
        for file in files:
            self.add_beside(file)
        self._write(self._found.model_copy(update={"reference": answer}))

    def add_file(self, name: str, kept: KeptFile) -> None:
        self._write(self._found.model_copy(update={"files": {**self._found.files, name: kept}}))

    def add_checked(
        self,
        name: str,
        file: Path,
        artifact: Artifact | None,
        verdict: FileVerdict,
        alike: tuple[bool, ...] = (),
    ) -> None:
        """Keep the verdict on a file; without `artifact` it isn't published."""
        if self._output is None:
            return
        artifact = artifact or describe_file(file, file.name)
        self.add_file(name, KeptFile(artifact=artifact, verdict=verdict, alike=alike))

    def add_folder(self, name: str, artifacts: Sequence[Artifact]) -> None:
        """Keep a folder of which all files are made."""
        files = {each.path: KeptFile(artifact=each) for each in artifacts}
        update = {
            "files": {**self._found.files, **files},
            "folders": {**self._found.folders, name: tuple(files)},
        }
        self._write(self._found.model_copy(update=update))

    def add_samples(self, samples: tuple[Sample, ...]) -> None:
        self._write(self._found.model_copy(update={"samples": samples}))

    def add_beside(self, file: Path) -> None:
        """Keep a file that others are compared with."""
        if self._output is None or not file.exists():
            return
        sha256 = describe_file(file, file.name).sha256
        self._output.upload(file, f"{self._folder}/{file.name}", sha256=sha256)
        beside = {**self._found.beside, file.name: sha256}
        self._write(self._found.model_copy(update={"beside": beside}))

    def bring(self, file: Path) -> bool:
        """Bring what was kept by that name, where it isn't here; returns whether it is."""
        sha256 = self._found.beside.get(file.name)
        if file.exists() or self._output is None or sha256 is None:
            return file.exists()
        try:
            self._output.download(f"{self._folder}/{file.name}", file)
        except FileNotFoundError:
            return False
        if describe_file(file, file.name).sha256 != sha256:
            file.unlink()
        return file.exists()

    def _read(self) -> Figures:
        data = self._output.read(f"{self._folder}/{FIGURES}") if self._output else None
        try:
            return Figures() if data is None else Figures.model_validate_json(data)
        except ValidationError:
            log.warning("%s is of another release; the files are checked again", FIGURES)
            return Figures()

    def _write(self, figures: Figures) -> None:
        self._found = figures
        if self._output is not None:
            data = figures.model_dump_json(exclude_none=True).encode()
            self._output.write(f"{self._folder}/{FIGURES}", data)
