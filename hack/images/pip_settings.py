"""Hands this machine's pip settings to an image's build, and leaves none of them in the image.

Where packages come from (an index, a folder of wheels, a private CA) is a fact of the machine that
builds. pip itself merges its files and PIP_ variables (`pip config list`), and what it says goes
into a pip.conf and a CA bundle that the Dockerfiles mount as build secrets. Local folders are
mounted below /dev, which a build step has as a file system of its own: a mount anywhere else would
leave its empty folder, named after this machine, in a layer.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from hack.process import output

SINGLE = ("index-url", "no-index", "proxy", "retries", "timeout")
LISTS = ("extra-index-url", "find-links", "trusted-host")
CA_IN_BUILD = "/run/secrets/ca.crt"


@dataclass(frozen=True)
class PipSettings:
    """A pip.conf for the build, and what it refers to."""

    config: str
    ca: Path | None
    mounts: dict[Path, str]

    def volumes(self) -> list[str]:
        """Return buildah's options that mount the local folders."""
        return [f"--volume={folder}:{inside}:ro" for folder, inside in self.mounts.items()]

    def secrets(self, folder: Path) -> list[str]:
        """Write the secrets' files and return the build options that mount them."""
        config = folder / "pip.conf"
        config.write_text(self.config)
        options = ["--secret", f"id=pip.conf,src={config}"]
        if self.ca:
            options += ["--secret", f"id=ca.crt,src={self.ca}"]
        return options


def pip_settings() -> PipSettings:
    """Read what pip on this machine is set to."""
    listing = output([sys.executable, "-m", "pip", "config", "list"])
    return from_listing(listing)


def from_listing(listing: str) -> PipSettings:
    """Turn the output of `pip config list` into settings; a variable wins over a file."""
    values: dict[str, str] = {}
    for _section, key, value in sorted(_rows(listing), key=lambda row: row[0] == ":env:"):
        merged = [values[key], value] if key in LISTS and key in values else [value]
        values[key] = " ".join(merged)
    values["timeout"] = values.pop("default-timeout", values.get("timeout", ""))
    ca = Path(values["cert"]) if values.get("cert") else None
    places = {key: values[key].split() for key in (*SINGLE, *LISTS) if values.get(key)}
    folders = dict.fromkeys(
        folder for items in places.values() for item in items if (folder := _folder(item))
    )
    mounts = {folder: f"/dev/pip-{number}" for number, folder in enumerate(folders)}
    lines = [_line(key, items, mounts) for key, items in places.items()]
    if ca:
        lines.append(f"cert = {CA_IN_BUILD}")
    return PipSettings("\n".join(["[global]", *lines]) + "\n", ca, mounts)


def _line(key: str, items: list[str], mounts: dict[Path, str]) -> str:
    for folder, inside in mounts.items():
        items = [
            item.replace(str(folder), inside) if _folder(item) == folder else item for item in items
        ]
    return f"{key} = " + "\n    ".join(dict.fromkeys(items))


def _rows(listing: str) -> list[tuple[str, str, str]]:
    found = re.findall(r"^(global|install|wheel|:env:)\.([a-z-]+)=(.*)$", listing, re.MULTILINE)
    return [(section, key, str(ast.literal_eval(value))) for section, key, value in found]


def _folder(place: str) -> Path | None:
    """The folder to mount for a local place; an index's pages link to files beside it."""
    url = urlsplit(place)
    if url.scheme not in {"", "file"} or not url.path.startswith("/"):
        return None
    path = Path(unquote(url.path))
    folder = path.parent if url.scheme and path.name == "simple" else path
    return folder if folder.is_dir() else None
