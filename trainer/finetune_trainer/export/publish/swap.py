"""The new version takes the place of the former one: manifest away, files, manifest.

A reader who finds manifest.json finds every file that it lists as it lists it:

1. The new manifest is left beside the staged files (commit.json): from here on the swap can be
   finished by a later attempt without computing anything again.
2. manifest.json moves to manifest.former.json.
3. The staged files are copied to their names by the store itself, or linked on disk.
4. Files of the former version that the new one doesn't have are deleted.
5. manifest.json is written.
6. Staged files, manifest.former.json and commit.json go, the last last.
"""

from __future__ import annotations

import json
from pathlib import PurePosixPath

from pydantic import ValidationError

from finetune_trainer.config import Stage
from finetune_trainer.marker import (
    MANIFEST,
    STAGES,
    Marker,
    find_complete,
    missing_files,
    stage_folder,
    stays_below,
)
from finetune_trainer.outcome import Artifact, Reason, StageError
from finetune_trainer.storage import Folder

FORMER = "manifest.former.json"
"""The manifest that is being replaced, with the files of all versions before the new one."""

RECORD = "commit.json"
_STAGED = f"{STAGES}/{Stage.EXPORT}/"


def swap(output: Folder, fingerprint: str, manifest: bytes) -> None:
    """Publish what is staged for a fingerprint; `manifest` is a Marker of exactly these files.

    Raises StageError or FileNotFoundError; it may be repeated from the start at any point.
    """
    base = stage_folder(Stage.EXPORT, fingerprint)
    marker = Marker.model_validate_json(manifest)
    files = {item.path for item in marker.files}
    former = former_files(output)
    output.write(f"{base}/{RECORD}", manifest)
    _set_aside(output, former)
    for path in sorted(files):
        output.copy(f"{base}/{path}", path)
    _check(output, marker)
    output.delete(sorted(former.keys() - files))
    output.write(MANIFEST, manifest)
    _clean_up(output, base)


def finish_interrupted(output: Folder, fingerprint: str) -> bytes | None:
    """Finish the swap of an earlier attempt, where it is not finished.

    Returns the manifest of what earlier attempts published, None where nothing (whole) is.
    """
    base = stage_folder(Stage.EXPORT, fingerprint)
    manifest = output.read(f"{base}/{RECORD}")
    marker = _parse(manifest)
    if manifest is None or marker is None:
        found = find_complete(output, Stage.EXPORT, fingerprint)
        return output.read(MANIFEST) if found else None
    if output.read(MANIFEST) == manifest:
        _clean_up(output, base)
    elif missing_files(output, marker, base):
        return None
    else:
        swap(output, fingerprint, manifest)
    return manifest


def former_files(output: Folder) -> dict[str, Artifact]:
    """Files that earlier versions left under their names, also of swaps that were interrupted."""
    records = [info.path for info in output.list(_STAGED) if info.path.endswith(f"/{RECORD}")]
    found: dict[str, Artifact] = {}
    for path in (*records, FORMER, MANIFEST):
        if marker := _parse(output.read(path)):
            found |= {item.path: item for item in marker.files if _may_go(item.path)}
    return found


def _set_aside(output: Folder, former: dict[str, Artifact]) -> None:
    old = output.read(MANIFEST)
    if old is None:
        return
    if _parse(old):  # else it is not ours, and is kept as it is
        files = [item.model_dump(mode="json", exclude_none=True) for item in former.values()]
        old = json.dumps({**json.loads(old), "files": files}, indent=2).encode()
    output.write(FORMER, old)
    output.delete([MANIFEST])


def _check(output: Folder, marker: Marker) -> None:
    if missing := missing_files(output, marker, ""):
        raise StageError(
            Reason.STORAGE_UNAVAILABLE,
            f"{output.uri_of(missing[0])} is not there, or not whole, after the store was told to "
            "copy it: look at the store's own log.",
        )


def _clean_up(output: Folder, base: str) -> None:
    record = f"{base}/{RECORD}"
    output.abandon(_STAGED)
    output.delete(info.path for info in output.list(_STAGED) if info.path != record)
    output.delete([FORMER])
    output.delete([record])


def _parse(data: bytes | None) -> Marker | None:
    try:
        return Marker.model_validate_json(data) if data else None
    except ValidationError:
        return None


def _may_go(path: str) -> bool:
    """Whether a path stays in the output folder, and out of what belongs to the stages."""
    return stays_below(path) and PurePosixPath(path).parts[:1] != (STAGES,)
