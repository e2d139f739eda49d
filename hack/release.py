"""What a release consists of, made from this checkout.

`python -m hack.release FOLDER` leaves in an empty folder: sdist and wheel, the chart's package, a
bill of materials (CycloneDX) of each image's Python packages, and SHA256SUMS. `--images` adds both
images as archives. Where RELEASE_KEY names a private key (PEM, elliptic curve), SHA256SUMS is
signed with it.

`python -m hack.release --write-version FOLDER` writes pyproject.toml's version, the only one that
anybody edits, into the chart below that folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated
from uuid import UUID, uuid5

import helm_python as helm
import typer
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from hack import REPOSITORY
from hack.images.build import NAMES, build_image

CHART = Path("charts") / "finetune-operator"
KEY = "RELEASE_KEY"
SUMS = "SHA256SUMS"
NAMESPACE = UUID("b46eb2b3-3d3d-4f43-8f0c-9e6f8f0f6b11")
"""Of the bills' serial numbers, so that the same pins give the same bill."""


def project_version() -> str:
    """The version of everything that is released."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    return str(tomllib.loads(text)["project"]["version"])


def write_version(folder: Path) -> None:
    """Give the chart below a folder the project's version."""
    file = folder / CHART / "Chart.yaml"
    text = file.read_text(encoding="utf-8")
    file.write_text(
        re.sub(r"(?m)^(version|appVersion): .*$", rf"\1: {project_version()}", text),
        encoding="utf-8",
    )


def make(folder: Path, images: bool = False) -> list[Path]:
    """Everything of a release, in a folder that must be empty; the files, SHA256SUMS last."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name another folder, or empty it")
    package(folder)
    helm.package(REPOSITORY / CHART, destination=folder)
    for name in NAMES:
        bill = folder / f"finetune-operator-{name}-{project_version()}.cdx.json"
        bill.write_text(bill_of_materials(name), encoding="utf-8")
        if images:
            target = folder / f"finetune-operator-{name}-{project_version()}.tar"
            shutil.copy(build_image(name).archive, target)
    sums = checksums(folder)
    if key := os.environ.get(KEY):
        sign(sums, Path(key))
    return sorted(folder.iterdir())


def package(folder: Path) -> None:
    """Build sdist and wheel, whose files are dated as the last commit: the same bytes each time."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    command += ["-t", "sdist", "-t", "wheel"]
    date = {"SOURCE_DATE_EPOCH": commit_time()}
    subprocess.run(
        command, cwd=REPOSITORY, env={**date, **os.environ}, check=True, stdout=subprocess.DEVNULL
    )


def commit_time() -> str:
    """Seconds since 1970 of the checkout's last commit."""
    command = ["git", "-C", str(REPOSITORY), "log", "-1", "--format=%ct"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def bill_of_materials(image: str) -> str:
    """The Python packages that an image installs, by its pins, as CycloneDX 1.6."""
    version = project_version()
    text = (REPOSITORY / "constraints" / f"{image}.txt").read_text(encoding="utf-8")
    described = Component(
        name=f"finetune-operator/{image}",
        version=version,
        type=ComponentType.CONTAINER,
        bom_ref="image",
    )
    written = datetime.fromtimestamp(int(commit_time()), UTC)
    components = [library(*line.split("==")) for line in text.split()]
    bill = Bom(
        serial_number=uuid5(NAMESPACE, f"{image} {version}\n{text}"),
        metadata=BomMetaData(component=described, timestamp=written),
        components=components,
    )
    bill.register_dependency(described, components)
    return JsonV1Dot6(bill).output_as_string(indent=2) + "\n"


def library(name: str, version: str) -> Component:
    """A package of Python's index."""
    url = PackageURL(type="pypi", name=name, version=version)
    return Component(
        name=name, version=version, type=ComponentType.LIBRARY, purl=url, bom_ref=str(url)
    )


def checksums(folder: Path) -> Path:
    """Write SHA256SUMS for what is in a folder, as `sha256sum --check` reads it."""
    lines = []
    for file in sorted(folder.iterdir()):
        with file.open("rb") as stream:
            lines.append(f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {file.name}\n")
    sums = folder / SUMS
    sums.write_text("".join(lines), encoding="utf-8")
    return sums


def sign(sums: Path, key: Path) -> None:
    """Leave SHA256SUMS.sig (DER), which `openssl dgst -sha256 -verify PUBLIC -signature` checks."""
    private = load_pem_private_key(key.read_bytes(), password=None)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise TypeError(f"{key} is no key of an elliptic curve: make one with `openssl ecparam`")
    signature = private.sign(sums.read_bytes(), ec.ECDSA(hashes.SHA256()))
    sums.with_name(f"{SUMS}.sig").write_bytes(signature)


def main(
    folder: Path,
    images: Annotated[bool, typer.Option("--images", help="Build and add both images.")] = False,
    version: Annotated[
        bool, typer.Option("--write-version", help="Write the version into FOLDER's chart.")
    ] = False,
) -> None:
    """Make a release in FOLDER, or write the version into the chart below it."""
    if version:
        write_version(folder)
        return
    for file in make(folder, images):
        print(f"{file.stat().st_size:>12,}  {file}")


if __name__ == "__main__":
    typer.run(main)
