"""Markers: a small JSON file that is written last and says that a stage's result is complete.

`stages/<stage>/<fingerprint>/complete.json` marks prepare and train; the manifest.json of a version
marks export (finetune_trainer.store.versions). Each lists its files with size and SHA-256, and
counts only while all of them are there.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path, PurePosixPath

from pydantic import ConfigDict, ValidationError

from finetune_trainer.contract import Artifact, Base, Stage
from finetune_trainer.store import Folder

MANIFEST = "manifest.json"
STAGES = "stages"  # folder of the output for what the stages keep for themselves
PUSHED = f"{STAGES}/hub.json"  # what was pushed to the Hub last: a Pushed
# What `prepare` leaves.
EXAMPLES, HELD_OUT, DATASET_REPORT = "examples.jsonl", "eval.jsonl", "dataset-report.json"
METRICS = "metrics.json"  # what `train` leaves beside the adapter

log = logging.getLogger(__name__)


class Marker(Base):
    """What complete.json holds, and the part of manifest.json that says the same."""

    model_config = ConfigDict(extra="ignore")

    stage: Stage
    fingerprint: str
    files: tuple[Artifact, ...]
    """Paths below the folder that the marker lies in."""


class Pushed(Base):
    """A version of the artifacts that is on the Hub."""

    model_config = ConfigDict(extra="ignore")

    repo: str
    revision: str
    manifest_sha256: str
    """Of the bytes of manifest.json."""

    commit: str
    """URL of the commit on the Hub."""


def stage_folder(stage: Stage, fingerprint: str) -> str:
    """Where a stage leaves its result, below spec.output.uri."""
    return f"{STAGES}/{stage}/{fingerprint}"


def marker_path(stage: Stage, fingerprint: str) -> str:
    """Where the marker of `prepare` or `train` is, below spec.output.uri."""
    return f"{stage_folder(stage, fingerprint)}/complete.json"


def stays_below(path: str) -> bool:
    """Whether the path of a file that somebody listed stays in the folder that it is below."""
    listed = PurePosixPath(path)
    return not listed.is_absolute() and ".." not in listed.parts


def describe_file(file: Path, path: str) -> Artifact:
    """Size and SHA-256 of a file on disk, under the name that it gets in the store."""
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return Artifact(path=path, bytes=file.stat().st_size, sha256=sha256)


def save_stage(output: Folder, stage: Stage, fingerprint: str, folder: Path) -> None:
    """Upload what a stage made, the marker last."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = tuple(describe_file(path, path.relative_to(folder).as_posix()) for path in paths)
    base = stage_folder(stage, fingerprint)
    for item in files:
        output.upload(folder / item.path, f"{base}/{item.path}", sha256=item.sha256)
    marker = Marker(stage=stage, fingerprint=fingerprint, files=files)
    output.write(marker_path(stage, fingerprint), marker.model_dump_json(indent=2).encode())


def find_complete(output: Folder, stage: Stage, fingerprint: str) -> Marker | None:
    """The stage's marker if it is for this fingerprint and its files are all there, else None.

    An export of which the quality gate rejected a file is published, but not complete.
    """
    if stage is Stage.EXPORT:
        from finetune_trainer.store.versions import find_version  # noqa: PLC0415 - imports this

        version = find_version(output, fingerprint)
        return None if version is None or version.rejected else version.marker
    path = marker_path(stage, fingerprint)
    data = output.read(path)
    if data is None:
        return None
    try:
        marker = Marker.model_validate_json(data)
    except ValidationError:
        log.warning("%s is no marker of this version; the stage runs again", output.uri_of(path))
        return None
    if (marker.stage, marker.fingerprint) != (stage, fingerprint):
        return None
    missing = missing_files(output, marker, path.rpartition("/")[0])
    if missing:
        log.warning(
            "%s lists files that are missing or have another size, e.g. %s; the stage runs again",
            output.uri_of(path),
            missing[0],
        )
        return None
    return marker


def missing_files(output: Folder, marker: Marker, base: str) -> list[str]:
    """Files of a marker that are not there with their size."""
    prefix = f"{base}/" if base else ""
    # One listing per top folder, so that an output folder with other things in it is not walked.
    tops = {item.path.partition("/")[0] for item in marker.files}
    sizes = {info.path: info.size for top in sorted(tops) for info in output.list(f"{prefix}{top}")}
    return [item.path for item in marker.files if sizes.get(prefix + item.path) != item.bytes]
