"""Makes a base image of the machine's own Debian release, where no registry serves one.

It comes from the mirrors that apt on this machine uses already, so it needs nothing that the
machine couldn't reach before; and the release is the machine's own so that what was compiled here
(llama.cpp's wheel) fits.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

from hack import cache_dir
from hack.debian import architecture, os_release
from hack.process import Unavailable, output, run
from hack.progress import step

PACKAGES = ("python3", "python3-venv", "ca-certificates", "libgomp1")
COMPONENTS = ("main", "universe")  # Ubuntu keeps python3-venv in universe
# As Debian's own slim images leave out; licences stay.
LEAVE_OUT = ("/usr/share/locale/*", "/usr/share/man/*", "/usr/share/doc/*")
KEEP = "/usr/share/doc/*/copyright"
CONTAINERFILE = "FROM scratch\nADD base.tar /\n"


def buildah(*arguments: str) -> list[str]:
    """Start of a buildah command line; its layers are kept in the cache, not in /var/lib."""
    storage = cache_dir() / "containers"
    return ["buildah", f"--root={storage / 'storage'}", f"--runroot={storage / 'run'}", *arguments]


def base_tar() -> Path:
    """Return the base's root file system as a tar, building it on first use (90 seconds)."""
    codename = os_release().get("VERSION_CODENAME", "")
    recipe = hashlib.sha256(repr((PACKAGES, LEAVE_OUT, KEEP)).encode()).hexdigest()[:6]
    tar = cache_dir() / "images" / f"base-{codename}-{architecture()}-{recipe}.tar"
    if tar.exists():
        return tar
    sources = apt_sources(codename)
    tar.parent.mkdir(parents=True, exist_ok=True)
    with (
        step(f"Base image of {codename} (once, about 90 s)") as current,
        tempfile.TemporaryDirectory(dir=tar.parent) as temporary,
    ):
        work = Path(temporary)
        (work / "sources.list").write_text("\n".join(sources) + "\n")
        command = ["mmdebstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}"]
        command += [f"--dpkgopt=path-exclude={pattern}" for pattern in LEAVE_OUT]
        command += [f"--dpkgopt=path-include={KEEP}"]
        command += [codename, str(work / "base.tar"), str(work / "sources.list")]
        run(command, log=tar.with_suffix(".log"), on_line=lambda line: current.detail(line[:70]))
        (work / "base.tar").replace(tar)
    return tar


def apt_sources(codename: str) -> list[str]:
    """List this machine's own sources of its release: the release, its updates and security."""
    fields = "$(RELEASE)|$(COMPONENT)|$(REPO_URI)"
    listing = output(["apt-get", "indextargets", "--format", fields, "Created-By: Packages"])
    rows = [line.split("|", 2) for line in listing.splitlines() if line.count("|") >= 2]
    wanted = (codename, f"{codename}-updates", f"{codename}-security")
    lines = [
        f"deb {uri} {suite} {component}"
        for suite, component, uri in rows
        if suite in wanted and component in COMPONENTS
    ]
    if not lines:
        raise Unavailable(
            "apt on this machine names no source of its own release; run apt-get update"
        )
    return list(dict.fromkeys(lines))


def base_image(build: list[str], log: Path) -> str:
    """Return the name of the base image in buildah's storage, importing the tar on first use."""
    tar = base_tar()
    reference = f"localhost/finetune-operator/{tar.stem.replace('base-', 'base:')}"
    if reference in output(buildah("images", "--format", "{{.Name}}:{{.Tag}}")).split():
        return reference
    with tempfile.TemporaryDirectory(dir=tar.parent) as temporary:
        work = Path(temporary)
        (work / "Containerfile").write_text(CONTAINERFILE)
        _link(tar, work / "base.tar")
        run([*build, "-t", reference, "-f", str(work / "Containerfile"), temporary], log=log)
    return reference


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
