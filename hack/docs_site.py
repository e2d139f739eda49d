"""A hook of mkdocs: pages of the repository's root join the site, and links lead on from it.

Pages below docs/ link to files beside docs/, as one reads them in the repository. On the site such
a link leads to the same page, to the repository where SITE_REPOSITORY names its address, or is
plain text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from hack import REPOSITORY

JOINED = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "reporting.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Pages outside docs/, by their names on the site."""

LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])+)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
VARIABLE = "SITE_REPOSITORY"


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add the pages that lie outside docs/."""
    from mkdocs.structure.files import File  # noqa: PLC0415 - the types above need no mkdocs

    for origin, name in JOINED.items():
        files.append(File.generated(config, name, abs_src_path=str(REPOSITORY / origin)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead each link to where it is on the site."""
    name = page.file.src_uri
    origin = next((key for key, value in JOINED.items() if value == name), f"docs/{name}")
    return lead(markdown, PurePosixPath(origin), PurePosixPath(name))


def lead(markdown: str, origin: PurePosixPath, name: PurePosixPath) -> str:
    """A page of the repository (`origin`) with the links of its page on the site (`name`)."""

    def replace(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        found = Path(os.path.normpath(origin.parent / target)).as_posix()
        there = JOINED.get(found) or (found[5:] if found.startswith("docs/") else None)
        if there is not None:
            return f"[{label}]({os.path.relpath(there, name.parent)}{anchor})"
        if address := os.environ.get(VARIABLE):
            return f"[{label}]({address.rstrip('/')}/blob/main/{found}{anchor})"
        return label if label.strip("`") == found else f"{label} (`{found}`)"

    return LINK.sub(replace, markdown)
