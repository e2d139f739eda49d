"""What goes when `output.keepVersions` says how many versions to keep.

The manifest or marker of a folder goes before its files. So what is half deleted is nothing, and
the next pruning deletes the rest.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from finetune_trainer.contract import VERSIONS, Fingerprints, Output, Stage
from finetune_trainer.store import Folder, stays_below
from finetune_trainer.store.marker import MANIFEST, OWNER, STAGES, find_complete, stage_folder
from finetune_trainer.store.versions import (
    FIRST_MANIFEST,
    Version,
    current,
    find_version,
    list_versions,
    make_current,
)

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
