"""Versions of the artifacts, and the pointer to the current one.

A version is complete when `versions/<version>/manifest.json` is there, and every file that it lists
is there with its size. From then on nothing in that folder changes. `manifest.json` in the output
folder itself has the same bytes and names the current version; one PUT makes another one current.

0.1.0 left its files in the output folder itself, with a manifest.json that names no version. That
is a version as well, with "" as its name. Its manifest moves to manifest.0.1.0.json when another
version becomes current.

What goes when `output.keepVersions` says how many versions to keep.

The manifest or marker of a folder goes before its files. So what is half deleted is nothing, and
the next pruning deletes the rest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from pydantic import ConfigDict, ValidationError

from finetune_trainer.contract import (
    VERSIONS,
    Artifact,
    Base,
    Fingerprints,
    Hub,
    Manifest,
    Output,
    Reason,
    Stage,
    StageError,
    VersionSummary,
    read_known,
    version_folder,
)
from finetune_trainer.contract.output import MODEL_FOLDERS
from finetune_trainer.store import Folder, stays_below
from finetune_trainer.store.marker import (
    MANIFEST,
    OWNER,
    PUSHED,
    STAGES,
    Marker,
    Pushed,
    find_complete,
    missing_files,
    stage_folder,
)

FIRST_MANIFEST = "manifest.0.1.0.json"
"""The manifest of what 0.1.0 left, while another version is current."""

_LENGTH = 12  # characters of the export's fingerprint in a version's name: 48 bits
_SUMMARIZED = 20  # versions that a stage tells of, since each means reading its manifest
_IS_MANIFEST = re.compile(rf"{VERSIONS}/[^/]+/{re.escape(MANIFEST)}")
_NAME = re.compile(r"[0-9A-Za-z]{0,64}")

log = logging.getLogger(__name__)


class VersionLineage(Base):
    """The part of a manifest's lineage that says which stages' results a version is made of."""

    model_config = ConfigDict(extra="ignore")

    fingerprints: Fingerprints


class VersionMarker(Marker):
    """The part of manifest.json that versions are told apart by."""

    version: str = ""
    created: str = ""
    lineage: VersionLineage | None = None

    @property
    def base(self) -> str:
        """The version's folder, below spec.output.uri."""
        return version_folder(self.version)


@dataclass(frozen=True)
class Version:
    """A version whose manifest is there. Its files may have been taken away since."""

    name: str
    """The folder's name below versions/; "" for what 0.1.0 left."""

    data: bytes
    """Of its manifest.json."""

    marker: VersionMarker

    @property
    def folder(self) -> str:
        """Where its files are, below the output folder; "" is that folder itself."""
        return version_folder(self.name)

    @property
    def rejected(self) -> bool:
        """Whether the quality gate refused one of its files."""
        return any(item.rejected for item in self.marker.files)

    @property
    def manifest_path(self) -> str:
        """Where its own manifest is, below the output folder."""
        return manifest_path(self.name)

    @property
    def described(self) -> str:
        """Its name in a sentence."""
        return f"version {self.name}" if self.name else "the version of 0.1.0"

    def path(self, path: str) -> str:
        """Where one of its files is, below the output folder."""
        return f"{self.folder}/{path}" if self.folder else path


def version_name(fingerprint: str) -> str:
    """The name of the version that an export with this fingerprint makes."""
    return fingerprint[:_LENGTH]


def manifest_path(name: str) -> str:
    """Where the manifest of a version is, below the output folder."""
    return f"{version_folder(name)}/{MANIFEST}" if name else MANIFEST


def new_version(fingerprint: str, manifest: bytes) -> Version:
    """A version whose files are there, and whose manifest is still to be written."""
    marker = VersionMarker.model_validate_json(manifest)
    name = version_name(fingerprint)
    if (marker.fingerprint, marker.version) != (fingerprint, name):
        raise ValueError(f"the manifest is of {marker.fingerprint}, {marker.version!r}")
    return Version(name, manifest, marker)


def missing(output: Folder, version: Version) -> list[str]:
    """Where files of a version should be, and are not or with another size."""
    return [version.path(path) for path in missing_files(output, version.marker, version.folder)]


def find_version(output: Folder, fingerprint: str) -> Version | None:
    """The version of this fingerprint, if all its files are there with their size.

    It may have files that the quality gate refused (`Version.rejected`).
    """
    for version in _candidates(output, fingerprint):
        if (version.marker.stage, version.marker.fingerprint) != (Stage.EXPORT, fingerprint):
            continue
        if not (lost := missing(output, version)):
            return version
        log.warning(
            "%s is missing or has another size, though a manifest lists it: the export runs again",
            output.uri_of(lost[0]),
        )
    return None


def current(output: Folder) -> Version | None:
    """The version that manifest.json names; None where there is none, or one of another program.

    Its files are not looked at.
    """
    return _parse(output.read(MANIFEST))


def make_current(output: Folder, version: Version) -> Version:
    """Let manifest.json name this version; returns the version that is current then.

    A version with rejected files doesn't take the place of a whole one without any.
    """
    now = current(output)
    if now is not None and now.data == version.data:
        return version
    if now is not None and version.rejected and _is_good(output, now):
        return now
    if now is not None and not now.name and output.read(FIRST_MANIFEST) != now.data:
        output.write(FIRST_MANIFEST, now.data)
    output.write(MANIFEST, version.data)
    return version


def withdraw(output: Folder, fingerprint: str) -> None:
    """Let a version that is no longer whole be none, before its files are written again.

    Raises StageError where the folder has the version of another fingerprint.
    """
    name = version_name(fingerprint)
    stands = _parse(output.read(manifest_path(name)), name)
    if stands is None:
        return
    if stands.marker.fingerprint != fingerprint:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{output.uri_of(stands.folder)} holds a version of another fingerprint that begins "
            "alike: move it away, or name another spec.output.uri.",
        )
    now = current(output)
    if now is not None and now.name == name:
        output.delete([MANIFEST])
    output.delete([manifest_path(name)])


def list_versions(output: Folder) -> list[Version]:
    """All versions whose manifest is there, the newest first; what 0.1.0 left is the oldest."""
    first = _first(output)
    return [*_named_versions(output), *([first] if first else [])]


def summarize_versions(output: Folder) -> tuple[VersionSummary, ...]:
    """The newest versions, and the current one, the newest first; not what 0.1.0 left."""
    now = current(output)
    found = _named_versions(output, _SUMMARIZED)
    if now and now.name and now.name not in {version.name for version in found}:
        found.append(now)
    return tuple(_summary(version, now) for version in found)


def find_rollback(output: Folder, name: str) -> Version:
    """The whole version of this name. Raises StageError(VersionNotFound), with those there are."""
    version = _parse(output.read(manifest_path(name)), name) if _NAME.fullmatch(name) else None
    fault = "is not there" if version is None else ""
    if version is not None and (lost := missing(output, version)):
        fault = f"is not whole: {output.uri_of(lost[0])} is missing or has another size"
    elif version is not None and version.rejected:
        fault = "has files that the quality gate refused"
    if version is not None and not fault:
        return version
    others = [each.version for each in summarize_versions(output) if not each.rejected]
    there = ", ".join(each for each in others if each != name) or "no other"
    raise StageError(
        Reason.VERSION_NOT_FOUND,
        f"spec.rollbackTo: the version {name} {fault}. {output.uri_of(VERSIONS)} holds {there}. "
        "Name one of these, or leave rollbackTo out to have the version of this spec.",
    )


def manifest_of(version: Version) -> Manifest | None:
    """The whole of its manifest; None where another release wrote what this one can't read."""
    try:
        return read_known(Manifest, json.loads(version.data)).value
    except ValueError:
        return None


def adopt_first_manifest(output: Folder, old: str, new: Fingerprints) -> bool:
    """Give what 0.1.0 exported under the fingerprint `old` the fingerprints of today.

    Nothing is copied. What was pushed to the Hub stays pushed. Returns whether there was such a
    version; may be repeated.
    """
    version = _first(output)
    if version is None or version.marker.fingerprint != old:
        return False
    if old == new.export:
        return True
    fields = json.loads(version.data)
    fields["fingerprint"] = new.export
    if isinstance(fields.get("lineage"), dict):
        fields["lineage"]["fingerprints"] = new.model_dump(mode="json")
    data = json.dumps(fields, indent=2, ensure_ascii=False).encode() + b"\n"
    _repush(output, version.data, data)
    for path in (FIRST_MANIFEST, MANIFEST):
        if output.read(path) == version.data:
            output.write(path, data)
    return True


def find_pushed(output: Folder, hub: Hub, version: Version) -> Pushed | None:
    """The last push to the Hub, if it brought this version to this repository and branch."""
    pushed = _pushed(output)
    if pushed is None:
        return None
    asked = (hub.repo, hub.revision, _sha256(version.data), set(map(str, hub.include)))
    done = (pushed.repo, pushed.revision, pushed.manifest_sha256, set(pushed.include))
    return pushed if done == asked else None


def image_files(version: Version, name: str) -> list[tuple[Artifact, str]]:
    """The files of one model of a version, as images are named, each with its path in there."""
    if name in MODEL_FOLDERS:
        folder = f"{name}/"
        found = [item for item in version.marker.files if item.path.startswith(folder)]
        return [(item, item.path.removeprefix(folder)) for item in found]
    # Of the adapter's file the name ends as that of a model in F32.
    named = re.compile(rf"gguf/(?!.*-LoRA-F32\.).+-{re.escape(name)}(-\d{{5}}-of-\d{{5}})?\.gguf")
    found = [item for item in version.marker.files if named.fullmatch(item.path)]
    return [(item, item.path.removeprefix("gguf/")) for item in found]


def _candidates(output: Folder, fingerprint: str) -> Iterator[Version]:
    name = version_name(fingerprint)
    if name and (version := _parse(output.read(manifest_path(name)), name)):
        yield version
    if first := _first(output):
        yield first


def _named_versions(output: Folder, count: int | None = None) -> list[Version]:
    """Those below versions/, the newest first; with `count`, those whose manifests are the
    youngest files."""
    listed = (info for info in output.list(f"{VERSIONS}/") if _IS_MANIFEST.fullmatch(info.path))
    infos = sorted(listed, key=lambda info: info.modified, reverse=True)
    found = [_parse(output.read(info.path), info.path.split("/")[1]) for info in infos[:count]]
    there = sorted(filter(None, found), key=lambda version: version.name)
    return sorted(there, key=lambda version: version.marker.created, reverse=True)


def _summary(version: Version, now: Version | None) -> VersionSummary:
    manifest = manifest_of(version)
    lineage = manifest.lineage if manifest else None
    return VersionSummary(
        version=version.name,
        current=now is not None and now.name == version.name,
        rejected=version.rejected,
        created=version.marker.created or None,
        dataset_etag=lineage.dataset_etag if lineage else None,
        dataset_rows=lineage.dataset_rows if lineage else None,
        model_revision=lineage.model_revision if lineage else None,
        eval_loss=manifest.metrics.get("evalLoss") if manifest else None,
    )


def _first(output: Folder) -> Version | None:
    """What 0.1.0 left, current or not."""
    now = current(output)
    if now is not None and not now.name:
        return now
    return _parse(output.read(FIRST_MANIFEST), "")


def _is_good(output: Folder, version: Version) -> bool:
    return not version.rejected and not missing(output, version)


def _parse(data: bytes | None, name: str | None = None) -> Version | None:
    """A manifest as a version; `name` is that of the folder that it lies in, where it is known."""
    if data is None:
        return None
    try:
        marker = read_known(VersionMarker, json.loads(data)).value
    except ValueError:
        return None
    name = marker.version if name is None else name
    if marker.stage is not Stage.EXPORT or marker.version != name or not _NAME.fullmatch(name):
        return None
    return Version(name, data, marker)


def _repush(output: Folder, old: bytes, new: bytes) -> None:
    """Let what was pushed with one manifest count as pushed with another."""
    pushed = _pushed(output)
    if pushed is not None and pushed.manifest_sha256 == _sha256(old):
        again = pushed.model_copy(update={"manifest_sha256": _sha256(new)})
        output.write(PUSHED, again.model_dump_json(indent=2).encode())


def _pushed(output: Folder) -> Pushed | None:
    data = output.read(PUSHED)
    try:
        return Pushed.model_validate_json(data) if data else None
    except ValidationError:
        return None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


_MARKER = "/complete.json"
_IN_VERSION = re.compile(rf"{VERSIONS}/[0-9a-f]{{12}}(?=/)")  # other folders are not the trainer's

log = logging.getLogger(__name__)


def make_current_and_prune(
    output: Folder, settings: Output, present: Fingerprints
) -> Version | None:
    """Make the version of the `present` run current, and keep as many as the settings say.

    Returns it; None where it isn't there as a whole.
    """
    version = find_version(output, present.export)
    if version is None:
        return None
    if make_current(output, version) is version and settings.keep_versions:
        prune(output, settings.keep_versions, present)
    return version


def prune(output: Folder, keep: int, present: Fingerprints) -> None:
    """Delete all versions but `keep`, and the stages' results that no kept version was made of.

    The current version is kept, then the newest ones without rejected files, then the others. What
    belongs to the `present` run stays. To be called when the run's version is current.
    """
    now = current(output)
    if now is None:
        return
    found = sorted(list_versions(output), key=lambda version: _rank(version, now))
    for version in reversed(found[keep:]):
        log.info("Deleting %s", version.described)
        _delete_version(output, version)
    discard_unfinished(output)
    _prune_stages(output, found[:keep], present)


def discard_unfinished(output: Folder) -> None:
    """Delete what exports left that never came to a manifest, and versions that are half deleted.

    To be called while no export is at work.
    """
    files: dict[str, list[str]] = {}
    for info in output.list(f"{VERSIONS}/"):
        if found := _IN_VERSION.match(info.path):
            files.setdefault(found[0], []).append(info.path)
    for folder, paths in files.items():
        if f"{folder}/{MANIFEST}" not in paths:
            output.delete(paths)
    output.abandon(f"{VERSIONS}/")


def _rank(version: Version, now: Version) -> tuple[bool, bool]:
    """The smaller, the sooner it is kept; versions of the same rank keep their order."""
    return version.name != now.name, version.rejected


def _delete_version(output: Folder, version: Version) -> None:
    if version.name:
        output.delete([version.path(MANIFEST)])
        output.delete(info.path for info in output.list(f"{version.folder}/"))
        return
    # Nothing but this manifest tells which files are its own, so it goes last. Without one of them
    # it is no version either.
    output.delete(item.path for item in version.marker.files if _is_artifact(item.path))
    output.delete([FIRST_MANIFEST])


def _is_artifact(path: str) -> bool:
    """Whether a path that 0.1.0 listed is that of an artifact, and not of something else's."""
    top = PurePosixPath(path).parts[:1]
    return stays_below(path) and top not in ((STAGES,), (VERSIONS,), (MANIFEST,), (OWNER,))


def _prune_stages(output: Folder, kept: Sequence[Version], present: Fingerprints) -> None:
    """Delete stages' results that neither a kept version nor the present run is made of."""
    lineages = [version.marker.lineage for version in kept]
    if not all(lineages):
        log.warning("A version doesn't say what it was made of, so all stages' results are kept")
        return
    prints = [present, *(lineage.fingerprints for lineage in lineages if lineage)]
    for stage in Stage:
        wanted = set[str]()
        for fingerprint in {getattr(each, stage) for each in prints}:
            wanted |= _folders_of(output, stage, fingerprint)
        for folder in sorted(_stage_folders(output, stage) - wanted):
            _delete_stage(output, folder)


def _folders_of(output: Folder, stage: Stage, fingerprint: str) -> set[str]:
    """A stage's folder, and the one that its marker says its files are in."""
    marker = find_complete(output, stage, fingerprint)
    return {stage_folder(stage, fingerprint), *([marker.base] if marker else [])}


def _stage_folders(output: Folder, stage: Stage) -> set[str]:
    base = f"{STAGES}/{stage}/"
    paths = [info.path.removeprefix(base) for info in output.list(base)]
    return {base + path.partition("/")[0] for path in paths if "/" in path}


def _delete_stage(output: Folder, folder: str) -> None:
    log.info("Deleting %s", output.uri_of(folder))
    paths = [info.path for info in output.list(f"{folder}/")]
    output.delete(path for path in paths if path.endswith(_MARKER))  # checkpoints' as well
    output.abandon(f"{folder}/")
    output.delete(path for path in paths if not path.endswith(_MARKER))
