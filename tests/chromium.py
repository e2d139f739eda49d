"""A Chromium for the tests that read a page in a real browser.

The first of these that starts is taken: the program that FINETUNE_CHROMIUM names, an installed
Chromium or Chrome, playwright's own browser, and on a Debian-like machine without any, Debian's
chromium-headless-shell. That is fetched once with the libraries and the font that it needs
(110 MB) and unpacked, not installed, into the user's cache folder (350 MB); no root is needed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Error, Playwright, sync_playwright

from hack import cache_dir, debian
from hack.process import ClusterError, Unavailable
from hack.progress import step
from tests.fixtures import start_or_leave_out

VARIABLE = "FINETUNE_CHROMIUM"
PROGRAMS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chromium-headless-shell",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
PACKAGES = ["chromium-headless-shell", "fontconfig-config", "fonts-dejavu-core"]
LEFT_OUT = {
    "libc6",  # goes with the machine's own dynamic linker
    # Only graphics drivers need these, and a headless browser draws on the CPU.
    "libgl1-mesa-dri",
    "libllvm15",
    "libz3-4",
    "libicu72",
}
RECIPE = 1
"""Raise it when the folder would be filled in another way."""

REMEDY = (
    f"install Chromium or Chrome, name one with {VARIABLE}, or run "
    "`python -m playwright install --with-deps chromium-headless-shell`"
)
FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{root}/usr/share/fonts</dir><cachedir>{root}/var/cache/fontconfig</cachedir></fontconfig>
"""

CONTRAST = """() => {
  const parse = text => {
    const values = text.match(/[\\d.]+/g).map(Number);
    return [...values.slice(0, 3), values[3] ?? 1];
  };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const text = parse(element.closest('svg') ? style.fill : style.color);
    const [high, low] = [light(text), light(behind(element))].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    found.push({text: walker.currentNode.data.trim().slice(0, 40), ratio});
  }
  return found;
}"""
"""Contrast of each text with what is behind it, by WCAG 2.2's formula (success criterion 1.4.3)."""


@dataclass(frozen=True)
class Chromium:
    """A browser's program, and what it needs in its environment."""

    program: Path
    environment: dict[str, str] = field(default_factory=dict)


@contextmanager
def started(config: pytest.Config) -> Iterator[Browser]:
    """A browser for some tests, which are left out where there is none."""
    with sync_playwright() as playwright:
        browsers: list[Browser] = []
        start_or_leave_out(config, "a real browser", lambda: browsers.append(launch(playwright)))
        yield browsers[0]
        browsers[0].close()


def launch(playwright: Playwright) -> Browser:
    """Start a browser; raises Unavailable where there is none and none can be fetched."""
    failures: list[str] = []
    for chromium in candidates(playwright):
        try:
            return playwright.chromium.launch(
                executable_path=chromium.program, env={**os.environ, **chromium.environment}
            )
        except Error as error:
            failures.append(f"{chromium.program} doesn't start: {error.message.splitlines()[0]}")
    raise Unavailable("; ".join([*failures, REMEDY]))


def candidates(playwright: Playwright) -> Iterator[Chromium]:
    """Browsers in the order in which they are tried; the last is fetched when it is asked for."""
    named = os.environ.get(VARIABLE)
    if named:
        yield Chromium(Path(named))
        return
    for name in PROGRAMS:
        found = shutil.which(name)
        if found:
            yield Chromium(Path(found))
    own = Path(playwright.chromium.executable_path)
    if own.exists():
        yield Chromium(own)
    if debian.is_debian_like():
        yield fetched()


def fetched() -> Chromium:
    """Debian's headless shell in the cache folder, fetched there when it is missing."""
    folder = cache_dir() / "chromium"
    root = folder / f"{debian.RELEASE}-r{RECIPE}-{debian.architecture()}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two checkouts' tests fetch it once
        if not root.exists():
            with step("Fetching Debian's Chromium into the cache folder (110 MB, once)"):
                _fetch(root)
    libraries = {str(file.parent) for file in root.glob("**/*-linux-gnu/**/*.so*")}
    environment = {
        "LD_LIBRARY_PATH": os.pathsep.join(sorted(libraries)),
        "FONTCONFIG_FILE": str(root / "fonts.conf"),
    }
    return Chromium(root / "usr/lib/chromium/chromium-headless-shell", environment)


def _fetch(root: Path) -> None:
    """Fill a temporary folder and rename it, so that one cut off never looks complete."""
    with tempfile.TemporaryDirectory(prefix="tree-", dir=root.parent) as name:
        work = Path(name)
        apt = debian.PrivateApt(work / "apt")
        apt.log = root.parent / "fetch.log"
        try:
            apt.update()
            packages = [each for each in apt.closure(PACKAGES) if each not in LEFT_OUT]
            apt.unpack(packages, work / "root")
        except ClusterError as error:
            raise Unavailable(f"Debian's Chromium can't be fetched ({error}); {REMEDY}") from error
        (work / "root" / "fonts.conf").write_text(FONTS.format(root=root))
        (work / "root").rename(root)
