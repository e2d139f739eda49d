"""The commands that the documentation tells its readers to type."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from hack import REPOSITORY

PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    REPOSITORY / "benchmarks" / "README.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
NOT_COMMANDS = ("yaml", "json", "csv", "python", "lua")
"""Languages of blocks in which nothing is typed into a shell."""
PROGRAMS = (
    "make|kubectl|helm|docker|git|aws|ollama|llama-cli|llama-server|vllm|python3?|pip|eksctl|gcloud|az"
    "|curl|weed|mc|jq|openssl|sha256sum|model_signing|head|ls|cd|finetune|finetune-trainer"
    r"|\.venv/bin/\S+"
)
COMMAND = re.compile(rf"^(?:\$ )?((?:[A-Z_]+=\S+ )*(?:{PROGRAMS})(?: .*)?)$")
NOT_RUN = "# not run"
FENCED = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^ {4}.*\n(?:\n(?= {4}))?)+", re.MULTILINE)


def blocks(text: str) -> Iterator[str]:
    """The text of each block that may have commands."""
    for _, language, body in FENCED.findall(text):
        if language not in NOT_COMMANDS:
            yield body
    for block in INDENTED.findall(FENCED.sub("", text)):
        yield "\n".join(line[4:] for line in block.splitlines())


def commands(page: Path) -> list[str]:
    """What a page has its reader type and doesn't mark as not run, with lines that go on joined."""
    found = []
    for block in blocks(page.read_text(encoding="utf-8")):
        if NOT_RUN in block:
            continue
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        found += [match[1] for line in lines if (match := COMMAND.match(line))]
    return [re.sub(r"\s+# .*$", "", each) for each in found]
