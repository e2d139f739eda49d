"""`finetune artifacts`, `report` and `chat` read what an export has published, by real HTTP."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_cli.bucket import Bucket
from finetune_cli.commands.chat import Manner
from finetune_cli.exits import CliError, ExitCode
from finetune_cli.job import Job
from finetune_cli.version import Version
from finetune_trainer.contract import Storage
from finetune_trainer.store import open_folder
from hack.object_store import Credentials
from tests.fixtures import moto_server
from tests.publishing import folder as version_folder
from tests.publishing import publish

OUTPUT = "s3://models/support"
FILES = {
    "gguf/m-F16.gguf": b"0123456789" * 400_000,
    "gguf/m-Q4_K_M.gguf": b"quantized" * 1000,
    "gguf/m-LoRA-F32.gguf": b"lora",
    "report.html": b"<html>",
    "Modelfile": b"FROM ./gguf/m-Q4_K_M.gguf\n",
}


@pytest.fixture(scope="module")
def store() -> Iterator[Credentials]:
    with moto_server() as credentials:
        credentials.client().create_bucket(Bucket="models")
        yield credentials


@pytest.fixture
def job(store: Credentials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job whose version has been published as the export publishes it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", store.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", store.secret_key)
    storage = {"endpoint": store.endpoint}
    publish(open_folder(OUTPUT, Storage(**storage)), tmp_path / "w", "a", FILES)
    status = {"manifestUri": f"{OUTPUT}/{version_folder('a')}/manifest.json"}
    return job_of({"output": {"uri": OUTPUT}, "storage": storage}, status)


def job_of(spec: dict[str, Any], status: dict[str, Any]) -> Job:
    return Job({"metadata": {"name": "support"}, "spec": spec, "status": status})


def test_what_was_cut_off_goes_on(job: Job, tmp_path: Path) -> None:
    found = Version.read(job)
    (file,) = found.chosen(["gguf/*F16*"])
    target = tmp_path / "here" / file.path
    target.parent.mkdir(parents=True)
    target.with_name(f"{target.name}.part").write_bytes(FILES[file.path][:3_000_000])
    counts: list[int] = []
    uri = found.uri(file)
    assert found.bucket.download(uri, target, file.bytes, file.sha256, counts.append)
    assert sum(counts) == file.bytes - 3_000_000
    assert target.read_bytes() == FILES[file.path]
    assert not found.bucket.download(uri, target, file.bytes, file.sha256)
    assert [each.name for each in target.parent.iterdir()] == [target.name]


def test_a_damaged_beginning_is_fetched_anew(job: Job, tmp_path: Path) -> None:
    found = Version.read(job)
    (file,) = found.chosen(["gguf/*Q4*"])
    target = tmp_path / "m.gguf"
    target.with_name("m.gguf.part").write_bytes(b"something else")
    assert found.bucket.download(found.uri(file), target, file.bytes, file.sha256)
    assert target.read_bytes() == FILES[file.path]


def test_what_the_manifest_doesnt_vouch_for_is_not_kept(job: Job, tmp_path: Path) -> None:
    found = Version.read(job)
    (file,) = found.chosen(["gguf/*Q4*"])
    other = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(CliError, match="SHA-256") as failed:
        found.bucket.download(found.uri(file), tmp_path / "m.gguf", file.bytes, other)
    assert failed.value.code is ExitCode.FAILED
    assert list(tmp_path.glob("m.gguf*")) == []


def test_the_smallest_file_that_is_a_model(job: Job) -> None:
    (file,) = Version.read(job).smallest_model()
    assert file.path == "gguf/m-Q4_K_M.gguf"


def test_other_versions_and_files_that_are_not_there(job: Job) -> None:
    name = version_folder("a").rpartition("/")[2]
    assert Version.read(job, name).name == name
    with pytest.raises(CliError) as absent:
        Version.read(job, "cccccccccccc")
    assert absent.value.code is ExitCode.NOT_FOUND
    with pytest.raises(CliError, match="no file matches"):
        Version.read(job).chosen(["*.bin"])


def test_a_store_that_is_away_and_keys_that_are_missing(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.store.s3_client.RETRIES", 1)
    with pytest.raises(CliError, match="--endpoint") as away:
        Version.read(job, endpoint="http://127.0.0.1:9")
    assert away.value.code is ExitCode.UNREACHABLE
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(CliError, match="AWS_PROFILE") as denied:
        Version.read(job, endpoint="http://127.0.0.1:8")
    assert denied.value.code is ExitCode.REFUSED


def test_a_folder_of_this_machine(tmp_path: Path) -> None:
    output = tmp_path / "output"
    publish(open_folder(str(output), Storage()), tmp_path / "w", "a", FILES)
    manifest = str(output / version_folder("a") / "manifest.json")
    found = Version.read(job_of({"output": {"uri": str(output)}}, {"manifestUri": manifest}))
    (target,) = found.download(found.chosen(["report.html"]), tmp_path / "here")
    assert target.read_bytes() == FILES["report.html"]
    with pytest.raises(CliError, match="on this machine"):
        Bucket(None, "this machine").read(str(tmp_path / "nothing"))


def test_how_a_modelfile_has_the_model_asked() -> None:
    modelfile = (
        'FROM ./m.gguf\nTEMPLATE """{{ .Prompt }}"""\nSYSTEM """Be brief.\nAlways."""\n'
        'PARAMETER temperature 0.6\nPARAMETER top_k 20\nPARAMETER stop "<|im_end|>"\n'
        "PARAMETER num_ctx 2048\nPARAMETER mirostat 1\n"
    )
    manner = Manner.of(modelfile)
    assert manner == Manner(
        2048, "Be brief.\nAlways.", {"temperature": 0.6, "top_k": 20, "stop": ["<|im_end|>"]}
    )
