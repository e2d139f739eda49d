"""A version of a job's artifacts, as its manifest lists it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_cli.bucket import Bucket, digest
from finetune_cli.exits import CliError, ExitCode
from finetune_cli.job import Job

if TYPE_CHECKING:
    from finetune_trainer.contract import Artifact

MANIFEST = "manifest.json"
_NAME = re.compile(r"[0-9a-f]{0,64}")  # empty in a manifest of 0.1.0


@dataclass(frozen=True)
class Version:
    """What a manifest says, and where its files lie."""

    bucket: Bucket
    folder: str
    manifest: dict[str, Any]
    files: tuple[Artifact, ...]
    raw: bytes = b""
    """The manifest as it was read."""

    @property
    def name(self) -> str:
        return str(self.manifest.get("version") or "")

    @classmethod
    def read(cls, job: Job, version: str | None = None, endpoint: str | None = None) -> Version:
        """Read the manifest of a version, or of the current one."""
        from finetune_trainer.contract import Artifact, read_readable
        from finetune_trainer.store import stays_below

        uri = _manifest_uri(job, version)
        bucket = Bucket.of(job, endpoint)
        try:
            raw = bucket.read(uri)
            found = json.loads(raw)
            listed = [read_readable(Artifact, each) for each in found["files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise CliError(ExitCode.FAILED, f"{uri} is no manifest: {error}.") from error
        name = str(found.get("version") or "")
        if not _NAME.fullmatch(name):  # it becomes a folder's name
            raise CliError(ExitCode.FAILED, f"{uri} is no manifest: its version is {name!r}.")
        files = tuple(each.value for each in listed if each and stays_below(each.value.path))
        return cls(bucket, uri.rpartition("/")[0], found, files, raw)

    def uri(self, file: Artifact) -> str:
        """Where a file lies."""
        return f"{self.folder}/{file.path}"

    def chosen(self, patterns: Sequence[str]) -> tuple[Artifact, ...]:
        """The files that match one of the patterns; without any, all but those refused."""
        if not patterns:
            return tuple(each for each in self.files if not each.rejected)
        found = [each for each in self.files if any(fnmatch(each.path, one) for one in patterns)]
        if not found:
            raise CliError(
                ExitCode.NOT_FOUND,
                f"no file matches {' or '.join(patterns)}; `finetune artifacts` lists them.",
            )
        return tuple(found)

    def refuse_to_overwrite(self, files: Sequence[Artifact], folder: Path) -> None:
        """Raise CliError where a file there has another content and isn't of this version."""
        manifest = folder / MANIFEST
        if self._is_here(manifest):
            return
        taken = [manifest] if manifest.exists() else []
        for file in files:
            target = folder / file.path
            if target.exists() and not _same(target, file):
                taken.append(target)
        if taken:
            raise CliError(
                ExitCode.USAGE,
                f"{taken[0]} is there already with another content: name another folder, or write "
                "over it with --force.",
            )

    def _is_here(self, manifest: Path) -> bool:
        """Whether a folder's manifest is of this version, so that its files were fetched."""
        try:
            found = json.loads(manifest.read_bytes())
        except (OSError, ValueError):
            return False
        same = ("version", "fingerprint", "created")
        return isinstance(found, dict) and all(
            found.get(key) == self.manifest.get(key) for key in same
        )

    def download(self, files: Sequence[Artifact], folder: Path) -> list[Path]:
        """Fetch files into a folder, with a bar on a terminal; those that are here stay."""
        import sys

        from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

        targets = []
        columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, disable=not sys.stderr.isatty()) as progress:
            for file in files:
                target = folder / file.path
                task = progress.add_task(file.path, total=file.bytes)

                def advance(count: int, task: Any = task) -> None:
                    progress.advance(task, count)

                self.bucket.download(self.uri(file), target, file.bytes, file.sha256, advance)
                progress.update(task, completed=file.bytes)
                targets.append(target)
        return targets

    def smallest_model(self) -> tuple[Artifact, ...]:
        """The smallest GGUF file that passed, with all of its parts."""
        whole: dict[str, list[Artifact]] = {}
        for each in self.files:
            name = each.path.rpartition("/")[2]
            if name.endswith(".gguf") and "-LoRA-" not in name and not each.rejected:
                whole.setdefault(each.whole, []).append(each)
        good = [parts for parts in whole.values() if not any(each.failed for each in parts)]
        if not good:
            raise CliError(
                ExitCode.NOT_FOUND,
                f"version {self.name} has no GGUF file that passed its checks: name types in "
                "spec.export.gguf.",
            )
        return tuple(min(good, key=lambda parts: sum(each.bytes for each in parts)))


def _same(target: Path, file: Artifact) -> bool:
    return (
        target.is_file() and target.stat().st_size == file.bytes and digest(target) == file.sha256
    )


def _manifest_uri(job: Job, version: str | None) -> str:
    folder = str(job.spec["output"]["uri"]).rstrip("/")
    if version:
        state = job.version(version).get("state") if job.versions else None
        if state == "Deleted":
            raise CliError(
                ExitCode.NOT_FOUND, f"the store doesn't hold version {version} any more."
            )
        return f"{folder}/versions/{version}/{MANIFEST}"
    found = job.status.get("manifestUri")
    if not found:
        raise CliError(
            ExitCode.NOT_FOUND,
            f"{job.name} has made nothing yet ({job.phase}): `finetune watch {job.name}`.",
        )
    return str(found)
