"""Builds the project's two images, with Docker where it runs and with buildah elsewhere.

An image's tag is a hash of the files that it is made of, so an unchanged image is never built or
loaded twice, and a changed one never passes for the old. Both tools keep the layers below the
code, so a change of code takes seconds. Each image ends as one archive in the cache, which
`kind load image-archive` or `ctr images import` reads.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from examples.base_model import smollm2
from hack import REPOSITORY, cache_dir
from hack.images.base import base_image, buildah
from hack.images.pip_settings import PipSettings, pip_settings
from hack.process import CommandFailed, Unavailable, run
from hack.progress import step

APT_PACKAGES = ("buildah", "runc", "mmdebstrap")
"""What a Debian machine without Docker needs."""

NAMES = ("operator", "trainer")
DEMO_STORE = "demo-store"
SHARED_INPUTS = (".dockerignore", "pyproject.toml", "images/*.py", "trainer/finetune_trainer/**/*")
INPUTS = {
    "operator": (
        "images/operator/*",
        "constraints/operator.txt",
        "operator/finetune_operator/**/*",
    ),
    "trainer": (
        "images/trainer/*",
        "images/trainer/wheels/.gitignore",
        "hack/llama_cpp.py",
        "constraints/trainer.txt",
        "constraints/unsloth.txt",
    ),
    DEMO_STORE: ("images/demo-store/*", "examples/base_model.py", "examples/data/*.csv"),
}
NOT_HASHED = ("README.md", "LICENSE")
"""Copied into the package's metadata alone: a build needs them, and no build is worth them."""

KEEP_ARCHIVES = 2
STAGED_TIME = 1577836800  # 2020-01-01: what the files of a build's context are dated
STEP_LINE = re.compile(r"^(?:\[\d+/\d+\] )?STEP \d+/\d+: .*|^#\d+ \[.*")


@dataclass(frozen=True)
class Image:
    """One built image: its name for a pod's spec, and the archive to load it from."""

    name: str
    reference: str
    archive: Path


@dataclass(frozen=True)
class Images:
    """The two images of the project."""

    operator: Image
    trainer: Image


def build_images() -> Images:
    """Build what has changed, and return both."""
    return Images(operator=build_image("operator"), trainer=build_image("trainer"))


def build_image(name: str) -> Image:
    """Build and archive one image, unless its archive is there already."""
    with locked(), tempfile.TemporaryDirectory() as temporary:
        context = Path(temporary)
        stage(name, REPOSITORY, context)
        tag = content_hash(name, context)
        archive = cache_dir() / "images" / f"{name}-{tag}.tar"
        image = Image(name, f"localhost/finetune-operator/{name}:{tag}", archive)
        if not archive.exists():
            if name == DEMO_STORE:
                shutil.copytree(smollm2(), context / "images" / DEMO_STORE / "model")
            with_docker = docker_works()
            (build_with_docker if with_docker else build_with_buildah)(image, context)
            archive_image(image, with_docker=with_docker)
            prune(name)
    return image


def stage(name: str, root: Path, context: Path) -> None:
    """Copy an image's inputs into a folder of their own: the build's context.

    What is built is then what was hashed, even while the code is being edited.
    """
    for file in input_files(name, root, extra=NOT_HASHED):
        target = context / file.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)


def set_dates(context: Path) -> None:
    """Give all files one date and mode: buildah's layer cache takes another date for a change."""
    for path in (context, *context.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
        os.utime(path, (STAGED_TIME, STAGED_TIME))


def input_files(name: str, root: Path, extra: tuple[str, ...] = ()) -> list[Path]:
    """List the files that an image is made of."""
    shared = SHARED_INPUTS if name in NAMES else (".dockerignore", "pyproject.toml")
    patterns = (*shared, *INPUTS[name], *extra)
    files = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    return sorted(file for file in files if "__pycache__" not in file.parts)


def content_hash(name: str, root: Path) -> str:
    """Hash an image's inputs: their paths and bytes."""
    digest = hashlib.sha256()
    for path in input_files(name, root):
        digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def docker_works() -> bool:
    """Whether there is a Docker daemon; the command alone proves nothing."""
    if not shutil.which("docker"):
        return False
    info = subprocess.run(["docker", "info"], capture_output=True, timeout=30, check=False)
    return info.returncode == 0


def build_with_docker(image: Image, context: Path) -> None:
    """Build from the public base image; llama.cpp is compiled in it, with its C library."""
    _build(image, context, ["docker", "build", "--progress=plain"], pip_settings())


def build_with_buildah(image: Image, context: Path) -> None:
    """Build from a base of the machine's own release, which also takes the wheel made here."""
    if missing := [tool for tool in APT_PACKAGES if not shutil.which(tool)]:
        raise Unavailable(
            "without a Docker daemon the images are built with buildah: "
            f"apt-get install {' '.join(missing)}"
        )
    if image.name == "trainer":
        offer_to_image(get_llama_cpp(), context / "images" / "trainer" / "wheels")
    settings = pip_settings()
    # crun, buildah's default, refuses machines that mount both kinds of cgroups.
    build = buildah("bud", "--runtime", shutil.which("runc") or "runc", "--network", "host")
    command = [*build, "--layers", "--ignorefile", str(context / ".dockerignore")]
    command += [f"--build-arg=BASE_IMAGE={base_image(build, _log(image.name))}"]
    _build(image, context, [*command, *settings.volumes()], settings)


def _build(image: Image, context: Path, command: list[str], settings: PipSettings) -> None:
    """Run the build, with the pip settings as secrets that end with it."""
    version = tomllib.loads((context / "pyproject.toml").read_text())["project"]["version"]
    set_dates(context)
    with (
        tempfile.TemporaryDirectory() as temporary,
        step(f"Image of the {image.name}") as current,
    ):
        command = [*command, f"--build-arg=VERSION={version}", "--tag", image.reference]
        command += settings.secrets(Path(temporary))
        command += ["--file", f"images/{image.name}/Dockerfile", "."]

        def show(line: str) -> None:
            if STEP_LINE.match(line):
                current.detail(re.sub(r" --\S+", "", line)[:60])

        run(command, log=_log(image.name), cwd=context, on_line=show)


def archive_image(image: Image, *, with_docker: bool) -> None:
    """Write the archive that a node loads; it appears under its name when it is whole."""
    image.archive.parent.mkdir(parents=True, exist_ok=True)
    part = image.archive.with_suffix(".part")
    part.unlink(missing_ok=True)
    command = ["docker", "save", "--output", str(part), image.reference]
    if not with_docker:
        target = f"docker-archive:{part}:{image.reference}"
        command = buildah("push", image.reference, target)
    with step(f"Archive of the {image.name}'s image"):
        run(command, log=_log(image.name))
    part.replace(image.archive)


def prune(name: str) -> None:
    """Remove the archives and tags of older builds; the layers stay for the next one."""
    archives = sorted(
        (cache_dir() / "images").glob(f"{name}-*.tar"), key=lambda path: path.stat().st_mtime
    )
    for archive in archives[:-KEEP_ARCHIVES]:
        archive.unlink()
        reference = f"localhost/finetune-operator/{name}:{archive.stem.rpartition('-')[2]}"
        tool = ["docker", "rmi"] if docker_works() else buildah("rmi")
        subprocess.run([*tool, reference], capture_output=True, check=False)


def _log(name: str) -> Path:
    return cache_dir() / "logs" / f"image-{name}.log"


@contextmanager
def locked() -> Iterator[None]:
    """Let one process at a time build: two would do the same work twice."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with (cache_dir() / "images.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class LlamaCpp:
    """The converter's folder (LLAMA_CPP_DIR) and the wheel that quantizes and loads."""

    converter: Path
    wheel: Path


def get_llama_cpp() -> LlamaCpp:
    """Return both, building the wheel on first use (5 minutes on 2 cores, with progress shown)."""
    command = [
        sys.executable,
        str(REPOSITORY / "hack" / "llama_cpp.py"),
        "--cache",
        str(cache_dir()),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise CommandFailed(command, done.returncode, "the message is above")
    places = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    return LlamaCpp(Path(places["converter"]), Path(places["wheel"]))


def offer_to_image(llama: LlamaCpp, folder: Path) -> None:
    """Put both into a build's images/trainer/wheels; it takes them only if they fit its base."""
    wheel = folder / "wheels" / llama.wheel.parent.name / llama.wheel.name
    wheel.parent.mkdir(parents=True)
    shutil.copy(llama.wheel, wheel)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(llama.converter, folder / llama.converter.name, ignore=ignore)
