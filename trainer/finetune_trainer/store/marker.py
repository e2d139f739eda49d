"""Markers: a small JSON file that is written last and says that a stage's result is complete.

`stages/<stage>/<fingerprint>/complete.json` marks prepare and train; the manifest.json of a version
marks export (finetune_trainer.store.versions). Each lists its files with size and SHA-256, and
counts only while all of them are there. What a later stage reads is compared with that.

`owner.json` names the FineTuneJob that an output folder belongs to. The first to come writes it, on
the condition that there is none, so that of two at the same time one loses. A FineTuneJob that is
deleted and made again under its name is the same owner. Outputs of 0.1.0 have none, and belong to
the first to come.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError

from finetune_trainer.contract import (
    Artifact,
    Base,
    Export,
    ImageReference,
    JobReference,
    Oci,
    Output,
    Reason,
    Stage,
    StageError,
)
from finetune_trainer.runtime import timestamp
from finetune_trainer.store import Folder, stays_below

MANIFEST = "manifest.json"
STAGES = "stages"  # folder of the output for what the stages keep for themselves
PUSHED = f"{STAGES}/hub.json"  # what was pushed to the Hub last: a Pushed
PUSHED_IMAGES = f"{STAGES}/oci.json"  # the pushes to container registries: PushedImages
REMEMBERED_PUSHES = 50  # of other versions
# What `prepare` leaves.
EXAMPLES, HELD_OUT, DATASET_REPORT = "examples.jsonl", "eval.jsonl", "dataset-report.json"
SUMMARY = "summary.json"
TOKENS = {EXAMPLES: "tokens.arrow", HELD_OUT: "eval-tokens.arrow"}  # of which file, in tokens
METRICS = "metrics.json"  # what `train` leaves beside the adapter

log = logging.getLogger(__name__)


def _check_folder(folder: str | None) -> str | None:
    if folder is not None and not stays_below(folder):
        raise ValueError(f"{folder!r} leaves the output folder")
    return folder


class Marker(Base):
    """What complete.json holds, and the part of manifest.json that says the same."""

    model_config = ConfigDict(extra="ignore")

    stage: Stage
    fingerprint: str
    files: tuple[Artifact, ...]
    """Paths below `base`."""

    folder: Annotated[str | None, AfterValidator(_check_folder)] = None
    """Where the files are, below spec.output.uri; absent where they lie beside the marker. So a
    result is known by another fingerprint without a copy of it."""

    @property
    def base(self) -> str:
        """The folder of the files, below spec.output.uri; empty for that folder itself."""
        if self.folder is not None:
            return self.folder
        return marker_path(self.stage, self.fingerprint).rpartition("/")[0]

    def sha256_of(self, path: str) -> str | None:
        """SHA-256 of a file that the marker lists, else None."""
        return next((item.sha256 for item in self.files if item.path == path), None)


class Pushed(Base):
    """A version of the artifacts that is on the Hub."""

    model_config = ConfigDict(extra="ignore")

    repo: str
    revision: str
    manifest_sha256: str
    """Of the bytes of manifest.json."""

    commit: str
    """URL of the commit on the Hub."""

    include: tuple[str, ...] = ()
    """Private files that were asked for."""


class PushedImages(Base):
    """The models of a version that are in a container registry."""

    model_config = ConfigDict(extra="ignore")

    repository: str
    tag: str | None
    format: str
    manifest_sha256: str
    """Of the bytes of manifest.json."""

    contents: tuple[str, ...]
    """The models that were asked for."""

    images: tuple[ImageReference, ...] = ()

    @classmethod
    def wanted(cls, oci: Oci, export: Export, manifest: bytes) -> PushedImages:
        """What a push of the version with this manifest leaves, but for the digests."""
        return cls(
            repository=oci.repository,
            tag=oci.tag,
            format=oci.format,
            manifest_sha256=hashlib.sha256(manifest).hexdigest(),
            contents=oci.contents(export),
        )


_PUSHES = TypeAdapter(tuple[PushedImages, ...])


def image_pushes(output: Folder) -> tuple[PushedImages, ...]:
    """The pushes to container registries, the last one first."""
    data = output.read(PUSHED_IMAGES)
    try:
        return _PUSHES.validate_json(data) if data else ()
    except ValidationError:
        return ()


def last_push(output: Folder, wanted: PushedImages) -> PushedImages | None:
    """The last push, if it was this one: a tag may have moved since an earlier one."""
    last = next(iter(image_pushes(output)), None)
    same = last is not None and last.model_copy(update={"images": ()}) == wanted
    return last if same else None


def record_push(output: Folder, push: PushedImages) -> None:
    """Remember it, and what is known of other versions' images."""
    others = [e for e in image_pushes(output) if e.manifest_sha256 != push.manifest_sha256]
    output.write(PUSHED_IMAGES, _PUSHES.dump_json((push, *others[:REMEMBERED_PUSHES]), indent=2))


def stage_folder(stage: Stage, fingerprint: str) -> str:
    """Where a stage leaves its result, below spec.output.uri."""
    return f"{STAGES}/{stage}/{fingerprint}"


def marker_path(stage: Stage, fingerprint: str) -> str:
    """Where the marker of `prepare` or `train` is, below spec.output.uri."""
    return f"{stage_folder(stage, fingerprint)}/complete.json"


def describe_file(file: Path, path: str) -> Artifact:
    """Size and SHA-256 of a file on disk, under the name that it gets in the store."""
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return Artifact(path=path, bytes=file.stat().st_size, sha256=sha256)


def save_stage(output: Folder, stage: Stage, fingerprint: str, folder: Path) -> Marker:
    """Upload what a stage made, the marker last."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = tuple(describe_file(path, path.relative_to(folder).as_posix()) for path in paths)
    base = stage_folder(stage, fingerprint)
    output.delete([marker_path(stage, fingerprint)])  # of an earlier attempt, which is incomplete
    for item in files:
        output.upload(folder / item.path, f"{base}/{item.path}", sha256=item.sha256)
    marker = Marker(stage=stage, fingerprint=fingerprint, files=files)
    write_marker(output, marker)
    return marker


def write_marker(output: Folder, marker: Marker) -> None:
    """Say that a stage's result is complete."""
    data = marker.model_dump_json(indent=2, exclude_none=True).encode()
    output.write(marker_path(marker.stage, marker.fingerprint), data)


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
    missing = missing_files(output, marker, marker.base)
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


@dataclass(frozen=True)
class StageFiles:
    """The files that a stage left. Each is compared with the marker when it is read.

    Methods raise StageError (StoredFileChanged where a file is gone, or is another one).
    """

    output: Folder
    marker: Marker

    def read(self, name: str) -> bytes:
        """The content of a small file."""
        listed = self._listed(name)
        data = self.output.read(self._path(name))
        found = None if data is None else (len(data), hashlib.sha256(data).hexdigest())
        if data is None or found != (listed.bytes, listed.sha256):
            raise self._changed(name)
        return data

    def fetch(self, name: str, target: Path) -> Path:
        """Bring a file to disk; returns `target`."""
        listed = self._listed(name)
        try:
            self.output.download(self._path(name), target)
        except FileNotFoundError as error:
            raise self._changed(name) from error
        found = describe_file(target, name)
        if (found.bytes, found.sha256) != (listed.bytes, listed.sha256):
            target.unlink()
            raise self._changed(name)
        return target

    def fetch_folder(self, name: str, target: Path) -> Path:
        """Bring all files below the folder `name` to the folder `target`, which is returned."""
        for item in self.marker.files:
            if item.path.startswith(f"{name}/"):
                self.fetch(item.path, target / item.path.removeprefix(f"{name}/"))
        return target

    def _path(self, name: str) -> str:
        return f"{self.marker.base}/{name}"

    def _listed(self, name: str) -> Artifact:
        for item in self.marker.files:
            if item.path == name and stays_below(name):
                return item
        raise self._changed(name)

    def _changed(self, name: str) -> StageError:
        marker = self.output.uri_of(marker_path(self.marker.stage, self.marker.fingerprint))
        return StageError(
            Reason.STORED_FILE_CHANGED,
            f"{self.output.uri_of(self._path(name))} is not the file that {marker} lists: somebody "
            "has deleted or replaced it, or the store has damaged it. Delete that marker, and ask "
            "for another look (finetune.dev/retry-requested-at): what belongs to it is made again.",
        )


def open_stage(output: Folder, stage: Stage, fingerprint: str) -> StageFiles:
    """What a stage before left for this fingerprint; StageError where its marker is gone."""
    path = marker_path(stage, fingerprint)
    try:
        marker = Marker.model_validate_json(output.read(path) or b"")
    except ValidationError as error:
        raise StageError(
            Reason.STORED_FILE_CHANGED,
            f"{output.uri_of(path)}, which says that {stage} is complete, is gone or is no marker: "
            "somebody has deleted or replaced it. Ask for another look "
            "(finetune.dev/retry-requested-at): the stage runs again.",
        ) from error
    return StageFiles(output, marker)


OWNER = "owner.json"
_ATTEMPTS = 3  # to read what somebody else wrote and may have deleted again


class Owner(Base):
    """What owner.json holds."""

    model_config = ConfigDict(extra="ignore")

    namespace: str
    name: str
    since: str
    """RFC 3339."""

    @property
    def job(self) -> str:
        """As a person names it, and as `takeOverFrom` does."""
        return f"{self.namespace}/{self.name}"


def claim(output: Folder, settings: Output, job: JobReference | None) -> None:
    """Make sure that the folder belongs to this FineTuneJob, before anything is written to it.

    A run without a FineTuneJob claims nothing, and may not write to what belongs to one. Raises
    StageError(OutputInUse) for the folder of another FineTuneJob, unless `takeOverFrom` names it.
    """
    for _ in range(_ATTEMPTS):
        owner = read_owner(output)
        if owner is None and job is not None:
            if output.create(OWNER, _encoded(job)):
                return
            continue  # somebody was faster
        if owner is None or _is(owner, job):
            return
        if job is not None and settings.take_over_from == owner.job:
            output.write(OWNER, _encoded(job))
            log.warning("%s was %s's and now belongs to this job", output.uri, owner.job)
            return
        raise _in_use(output, owner, settings, job)
    raise StageError(
        Reason.STORAGE_UNAVAILABLE,
        f"{output.uri_of(OWNER)} comes and goes: see who else writes to the folder.",
    )


def check_owner(output: Folder, settings: Output, job: JobReference | None) -> None:
    """Make sure that the folder still belongs to this FineTuneJob. Raises StageError."""
    owner = read_owner(output)
    if owner is not None and not _is(owner, job):
        raise _in_use(output, owner, settings, job)


def read_owner(output: Folder) -> Owner | None:
    """Whom the folder belongs to, if to anybody; StageError if that can't be told."""
    data = output.read(OWNER)
    if data is None:
        return None
    try:
        return Owner.model_validate_json(data)
    except ValidationError as error:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{output.uri_of(OWNER)} doesn't say which FineTuneJob the folder belongs to: name "
            "another spec.output.uri, or delete that object if the folder is this job's.",
        ) from error


def _is(owner: Owner, job: JobReference | None) -> bool:
    return job is not None and (owner.namespace, owner.name) == (job.namespace, job.name)


def _encoded(job: JobReference) -> bytes:
    owner = Owner(namespace=job.namespace, name=job.name, since=timestamp())
    return owner.model_dump_json(indent=2).encode() + b"\n"


def _in_use(output: Folder, owner: Owner, settings: Output, job: JobReference | None) -> StageError:
    belongs = f"{output.uri} belongs to the FineTuneJob {owner.job} since {owner.since}"
    if job is None:
        remedy = "a run without a FineTuneJob may not write to it; name another output.uri"
    else:
        remedy = (
            "give each its own spec.output.uri, or take the folder over with "
            f"spec.output.takeOverFrom: {owner.job}"
        )
        if settings.take_over_from:
            belongs += f"; spec.output.takeOverFrom names {settings.take_over_from}"
    return StageError(Reason.OUTPUT_IN_USE, f"{belongs}: {remedy}.")
