"""Hands this machine's pip settings to an image's build, and leaves none of them in the image.

Where packages come from (an index, a folder of wheels, a private CA) is a fact of the machine that
builds. pip itself merges its files and PIP_ variables (`pip config list`), and what it says goes
into a pip.conf and a CA bundle that the Dockerfiles mount as build secrets. Local folders are
mounted under the path that they have here.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.cluster.process import output

SINGLE = ("index-url", "no-index", "proxy", "retries", "timeout")
LISTS = ("extra-index-url", "find-links", "trusted-host")
CA_IN_BUILD = "/run/secrets/ca.crt"


@dataclass(frozen=True)
class PipSettings:
    """A pip.conf for the build, and what it refers to."""

    config: str
    ca: Path | None
    folders: tuple[Path, ...]

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
    lines = [f"{key} = {values[key]}" for key in SINGLE if values.get(key)]
    sources = {key: list(dict.fromkeys(values.get(key, "").split())) for key in LISTS}
    lines += [f"{key} =\n    " + "\n    ".join(items) for key, items in sources.items() if items]
    if ca:
        lines.append(f"cert = {CA_IN_BUILD}")
    places = [*sources["extra-index-url"], *sources["find-links"], values.get("index-url", "")]
    folders = dict.fromkeys(folder for place in places if (folder := _folder(place)))
    return PipSettings("\n".join(["[global]", *lines]) + "\n", ca, tuple(folders))


def _rows(listing: str) -> list[tuple[str, str, str]]:
    found = re.findall(r"^(global|install|wheel|:env:)\.([a-z-]+)=(.*)$", listing, re.MULTILINE)
    return [(section, key, str(ast.literal_eval(value))) for section, key, value in found]


def _folder(place: str) -> Path | None:
    """The folder to mount for a local place; an index's pages link to files beside it."""
    url = urlsplit(place)
    if url.scheme == "file":
        path = Path(unquote(url.path))
        return path.parent if path.name == "simple" else path
    return Path(place) if place.startswith("/") else None
