"""The files of examples: where they are, and bringing one version of each to disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetune_trainer.config import RunConfig, Storage
from finetune_trainer.outcome import Reason, StageError
from finetune_trainer.progress import Reporter
from finetune_trainer.storage import FileInfo, Folder, open_folder, split


@dataclass(frozen=True)
class DataFile:
    """A file of examples at one version."""

    uri: str
    folder: Folder
    info: FileInfo

    @property
    def etag(self) -> str:
        """Changes with the content."""
        return self.info.etag

    def fetch(self, target: Path, reporter: Reporter) -> bool:
        """Bring the file to disk; tells whether it is still the version that was found."""
        moved = reporter.transfer(f"Fetching {self.uri}", self.info.size)
        try:
            self.folder.download(self.info.path, target, moved)
        except FileNotFoundError:
            return False
        return self.folder.stat(self.info.path) == self.info


@dataclass(frozen=True)
class DataFiles:
    """The dataset, and the file with held-out rows if the spec names one."""

    rows: DataFile
    held_out: DataFile | None

    @property
    def eval_etag(self) -> str | None:
        """ETag of the file with held-out rows."""
        return self.held_out.etag if self.held_out else None


def find(config: RunConfig) -> DataFiles:
    """Find the files; raises StageError(DatasetNotFound) and the store's reasons."""
    dataset = config.dataset
    rows = _find(dataset.source, "spec.dataset.source", config.storage)
    held_out = None
    if dataset.eval_source is not None:
        held_out = _find(dataset.eval_source, "spec.dataset.evalSource", config.storage)
    return DataFiles(rows, held_out)


def _find(uri: str, field: str, storage: Storage) -> DataFile:
    parent, name = split(uri)
    folder = open_folder(parent, storage)
    info = folder.stat(name) if name else None
    if info is None:
        raise StageError(
            Reason.DATASET_NOT_FOUND,
            f"There is no dataset at {uri}: upload the file there, or correct {field}.",
        )
    return DataFile(uri, folder, info)
