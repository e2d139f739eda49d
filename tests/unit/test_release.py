"""What `make release` makes: packages that install, a chart that renders, sums that hold."""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import helm_python as helm
import pytest
import yaml

from hack import REPOSITORY, release

VERSION = release.project_version()
STEM = f"finetune_operator-{VERSION}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release, signed with a key that lies beside it."""
    folder = tmp_path_factory.mktemp("release")
    for command in (  # as docs/releasing.md and docs/publishing.md have them
        "openssl ecparam -name prime256v1 -genkey -noout -out release.pem",
        "openssl ec -in release.pem -pubout -out release.pub",
    ):
        subprocess.run(command.split(), cwd=folder, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(release.KEY, str(folder / "release.pem"))
        release.make(folder / "dist")
    return folder / "dist"


def test_a_release_has_these_files(made: Path) -> None:
    assert {file.name for file in made.iterdir()} == {
        f"{STEM}.tar.gz",
        f"{STEM}-py3-none-any.whl",
        f"finetune-operator-{VERSION}.tgz",
        f"finetune-operator-operator-{VERSION}.cdx.json",
        f"finetune-operator-trainer-{VERSION}.cdx.json",
        "SHA256SUMS",
        "SHA256SUMS.sig",
    }


def test_the_wheel_has_the_packages_and_the_sdist_what_builds_it(made: Path) -> None:
    with zipfile.ZipFile(made / f"{STEM}-py3-none-any.whl") as wheel:
        names = wheel.namelist()
        metadata = wheel.read(f"{STEM}.dist-info/METADATA").decode()
    assert {"finetune_operator/main.py", "finetune_trainer/__main__.py"} <= set(names)
    assert {name.partition("/")[0] for name in names} <= {
        "finetune_operator",
        "finetune_trainer",
        "finetune_cli",
        f"{STEM}.dist-info",
    }
    assert f"\nVersion: {VERSION}\n" in metadata
    with tarfile.open(made / f"{STEM}.tar.gz") as sdist:
        files = set(sdist.getnames())
    assert {f"{STEM}/{name}" for name in ("pyproject.toml", "LICENSE", "README.md")} <= files


def test_the_chart_renders_from_its_package_with_the_same_version(made: Path) -> None:
    archive = (made / f"finetune-operator-{VERSION}.tgz").read_bytes()
    with helm.Chart.load_archive(archive) as chart:
        assert chart.version == VERSION
        rendered = "".join(chart.render({}, name="x", namespace="y").values())
    assert f"finetune-operator/operator:{VERSION}" in rendered
    assert f"finetune-operator/trainer:{VERSION}" in rendered


@pytest.mark.parametrize("image", ["operator", "trainer"])
def test_a_bill_lists_every_pin(made: Path, image: str) -> None:
    bill = json.loads((made / f"finetune-operator-{image}-{VERSION}.cdx.json").read_text())
    pins = (REPOSITORY / "constraints" / f"{image}.txt").read_text().split()
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert sorted(f"{each['name']}=={each['version']}" for each in bill["components"]) == sorted(
        pins
    )
    assert all(each["purl"].startswith("pkg:pypi/") for each in bill["components"])


def test_the_sums_hold_and_the_signature_is_of_them(made: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=made, check=True)
    listed = {line.split()[1] for line in (made / "SHA256SUMS").read_text().splitlines()}
    assert listed == {file.name for file in made.iterdir()} - {"SHA256SUMS", "SHA256SUMS.sig"}
    verify = ["openssl", "dgst", "-sha256", "-verify", str(made.parent / "release.pub")]
    verify += ["-signature", "SHA256SUMS.sig", "SHA256SUMS"]
    subprocess.run(verify, cwd=made, check=True)


def test_a_second_release_of_the_commit_has_the_same_packages(made: Path, tmp_path: Path) -> None:
    release.make(tmp_path / "again")
    bills = [file.name for file in made.glob("*.cdx.json")]
    for name in (f"{STEM}.tar.gz", f"{STEM}-py3-none-any.whl", *bills):
        assert (made / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert not (tmp_path / "again" / "SHA256SUMS.sig").exists(), "there is no key"


def test_nothing_is_written_beside_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    with pytest.raises(ValueError, match="is not empty"):
        release.make(tmp_path)


def test_the_version_stands_in_one_place(tmp_path: Path) -> None:
    chart = tmp_path / release.CHART / "Chart.yaml"
    chart.parent.mkdir(parents=True)
    chart.write_text("version: 0.0.1\nname: x\nappVersion: 0.0.2\n")
    release.write_version(tmp_path)
    assert chart.read_text() == f"version: {VERSION}\nname: x\nappVersion: {VERSION}\n"
    there = yaml.safe_load((REPOSITORY / release.CHART / "Chart.yaml").read_text())
    assert (there["version"], there["appVersion"]) == (VERSION, VERSION)


def test_the_pages_name_the_version_that_is_built() -> None:
    for page in ("install.md", "clusters.md", "air-gapped.md"):
        text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
        named = set(re.findall(r"/(?:operator|trainer):(\d[\w.]*)", text))
        assert named == {VERSION}, page


def test_artifact_hub_finds_what_it_shows() -> None:
    chart = yaml.safe_load((REPOSITORY / release.CHART / "Chart.yaml").read_text())
    notes = chart["annotations"]
    (kind,) = yaml.safe_load(notes["artifacthub.io/crds"])
    definition = yaml.safe_load(next((REPOSITORY / "crds").glob("*.yaml")).read_text())
    assert kind["name"] == definition["metadata"]["name"]
    assert kind["version"] == definition["spec"]["versions"][0]["name"]
    (example,) = yaml.safe_load(notes["artifacthub.io/crdsExamples"])
    assert example["kind"] == kind["kind"]
    assert notes["artifacthub.io/license"] == "Apache-2.0"
