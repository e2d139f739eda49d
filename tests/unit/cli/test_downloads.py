"""`finetune artifacts --download` beside files that are there already."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune_cli.exits import CliError, ExitCode
from finetune_cli.job import Job
from finetune_cli.version import Version
from finetune_trainer.contract import Storage
from finetune_trainer.store import open_folder
from tests.publishing import folder as version_folder
from tests.publishing import publish

FILES = {"README.md": b"the model", "Modelfile": b"FROM x"}


def published(folder: Path, name: str) -> Version:
    version = version_folder(name).rpartition("/")[2]
    publish(open_folder(str(folder / "bucket"), Storage()), folder / "work", name, FILES)
    return Version.read(
        Job({"metadata": {"name": "a"}, "spec": {"output": {"uri": str(folder / "bucket")}}}),
        version,
    )


def test_files_with_another_content_are_refused_by_name(tmp_path: Path) -> None:
    found, folder = published(tmp_path, "a"), tmp_path / "here"
    found.refuse_to_overwrite(found.files, folder)
    folder.mkdir()
    (folder / "Modelfile").write_bytes(FILES["Modelfile"])  # of a download that was cut off
    found.refuse_to_overwrite(found.files, folder)
    (folder / "README.md").write_text("my own")
    with pytest.raises(CliError) as caught:
        found.refuse_to_overwrite(found.files, folder)
    assert caught.value.code is ExitCode.USAGE
    assert f"{folder / 'README.md'} is there" in caught.value.message
    assert "--force" in caught.value.message


def test_a_manifest_of_this_version_alone_makes_a_folder_ours(tmp_path: Path) -> None:
    found, folder = published(tmp_path, "a"), tmp_path / "here"
    folder.mkdir()
    (folder / "README.md").write_text("damaged")
    (folder / "manifest.json").write_bytes(found.raw)
    found.refuse_to_overwrite(found.files, folder)
    (folder / "manifest.json").write_text('{"name": "of a web page"}')
    with pytest.raises(CliError, match=r"manifest\.json is there"):
        found.refuse_to_overwrite(found.files, folder)


def test_a_version_that_leads_elsewhere_is_no_version(tmp_path: Path) -> None:
    found = published(tmp_path, "a")
    file = Path(found.folder) / "manifest.json"
    file.write_text(json.dumps({**found.manifest, "version": "../../evil"}))
    job = Job({"metadata": {"name": "a"}, "spec": {"output": {"uri": str(tmp_path / "bucket")}}})
    with pytest.raises(CliError, match="no manifest"):
        Version.read(job, found.name)
