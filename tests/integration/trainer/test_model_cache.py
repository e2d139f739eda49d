"""The cache of base models that all jobs mount, and base models that are images."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from finetune_trainer.contract import (
    MODEL_CACHE,
    Model,
    Reason,
    StageError,
    Storage,
    display_name,
)
from finetune_trainer.memory.forecast import downloaded
from finetune_trainer.model import base_model
from finetune_trainer.model.base_model import BaseModelFiles, stays_in_cache
from finetune_trainer.runtime.reporter import Reporter
from hack.object_store import Credentials
from tests.integration.trainer import first_release
from tests.integration.trainer.conftest import use_keys
from tests.integration.trainer.hub_server import COMMIT, hub_server

NOBODY = 65534
JOBS = 4


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that every job mounts; others may look into the folders above it as well."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        root, own = Path(folder, "models"), Path(folder, "own")
        root.mkdir()
        own.mkdir()
        own.chmod(0o777)
        monkeypatch.setenv(MODEL_CACHE, str(root))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(own))
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(own / "token"))
        yield root


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[None]:
    del cache
    with hub_server(first_release.MODEL) as endpoint:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield


@contextmanager
def not_writable(folder: Path) -> Iterator[None]:
    """As a volume that is mounted read-only; root may write to any folder, so be somebody else."""
    for each in (folder, *folder.rglob("*")):
        if not each.is_symlink():
            each.chmod(0o555 if each.is_dir() else 0o444)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for each in (folder, *folder.rglob("*")):
            if each.is_dir():
                each.chmod(0o755)


def found(source: str = "public/tiny", storage: Storage | None = None) -> BaseModelFiles:
    return base_model.find(Model(source=source), storage or Storage())


def fetched(files: BaseModelFiles, target: Path, storage: Storage | None = None) -> Path:
    return base_model.fetch(files, storage or Storage(), target, Reporter(), weights=True).path


def is_whole(folder: Path) -> bool:
    names = ("config.json", "model.safetensors")
    return all((folder / n).read_bytes() == (first_release.MODEL / n).read_bytes() for n in names)


@pytest.mark.usefixtures("hub")
def test_what_one_job_has_fetched_from_the_hub_is_there_for_all(
    cache: Path, tmp_path: Path
) -> None:
    files = found()
    with ThreadPoolExecutor(JOBS) as jobs:
        folders = set(jobs.map(lambda _: fetched(files, tmp_path), range(JOBS)))
    (folder,) = folders
    assert folder.is_relative_to(cache)
    assert folder.name == COMMIT
    assert is_whole(folder)
    assert stays_in_cache(files)


def test_what_is_there_is_not_fetched_again(
    hub: None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del hub
    files = found()
    first = fetched(files, tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with not_writable(cache):
        assert fetched(files, tmp_path) == first
        assert stays_in_cache(files)


@pytest.mark.usefixtures("hub")
def test_a_cache_that_cannot_be_written_leaves_each_stage_to_fetch_what_it_lacks(
    cache: Path, tmp_path: Path
) -> None:
    files = found()
    base_model.fetch(files, Storage(), tmp_path, Reporter(), weights=False)
    with not_writable(cache):
        assert not stays_in_cache(files)
        folder = fetched(files, tmp_path)
    assert folder.is_relative_to(cache.parent / "own")
    assert is_whole(folder)


@pytest.mark.usefixtures("hub")
def test_a_file_of_another_size_is_not_taken_for_the_models(cache: Path, tmp_path: Path) -> None:
    files = found()
    weights = fetched(files, tmp_path) / "model.safetensors"
    blob = weights.resolve()
    blob.write_bytes(b"half")
    assert base_model.cached(files, files.sizes) is None
    blob.unlink()
    assert is_whole(fetched(files, tmp_path))
    assert weights.is_relative_to(cache)


def test_a_buckets_model_stays_in_the_cache_as_well(
    moto: Credentials, bucket: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_keys(moto, monkeypatch)
    client, storage = moto.client(), Storage(endpoint=moto.endpoint)
    for file in first_release.MODEL.iterdir():
        client.upload_file(str(file), bucket, f"cached/{file.name}")
    files = found(f"s3://{bucket}/cached", storage)
    with ThreadPoolExecutor(JOBS) as jobs:
        (folder,) = set(jobs.map(lambda _: fetched(files, tmp_path, storage), range(JOBS)))
    assert folder.is_relative_to(cache)
    assert is_whole(folder)
    assert {file.name for file in folder.iterdir()} == set(files.sizes)  # nothing half done
    client.delete_object(Bucket=bucket, Key="cached/model.safetensors")
    assert fetched(files, tmp_path, storage) == folder


def test_what_a_dead_job_began_to_fetch_leaves_the_cache_after_a_day(
    moto: Credentials, bucket: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_keys(moto, monkeypatch)
    storage = Storage(endpoint=moto.endpoint)
    files = found(f"s3://{bucket}/models/tiny", storage)
    folder = cache / "folders" / files.revision.replace(":", "-")
    folder.mkdir(parents=True)
    dead, alive = folder / ".partial-0a1b2c3d-model.safetensors", folder / ".partial-4e5f-a.json"
    for file, hours in ((dead, 25), (alive, 23)):
        file.write_bytes(b"half")
        then = time.time() - 3600 * hours
        os.utime(file, (then, then))
    assert fetched(files, tmp_path, storage) == folder
    assert not dead.exists()
    assert alive.exists()


def test_a_file_is_on_the_disk_before_it_has_its_name_in_the_cache(
    moto: Credentials, bucket: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_keys(moto, monkeypatch)
    storage, synced = Storage(endpoint=moto.endpoint), list[str]()
    files = found(f"s3://{bucket}/models/tiny", storage)
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    folder = fetched(files, tmp_path, storage)
    assert folder.is_relative_to(cache)
    for name in files.sizes:
        assert (folder / name).exists()
        assert any(each.startswith(".partial-") and each.endswith(name) for each in synced)
    synced.clear()
    monkeypatch.delenv(MODEL_CACHE)
    fetched(files, tmp_path, storage)
    assert not synced, "a pod's own folder dies with it"


def test_without_a_cache_models_go_where_they_went(
    hub: None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del hub
    monkeypatch.delenv(MODEL_CACHE)
    files = found()
    assert fetched(files, tmp_path).is_relative_to(cache.parent / "own")
    assert not stays_in_cache(files)


IMAGE = "oci://registry.example.com/models/tiny:1"


@pytest.mark.parametrize("inside", ["", "models"], ids=["in its root", "as KServe has it"])
def test_a_model_that_is_an_image_is_read_where_it_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    folder = tmp_path / "mounted" / inside
    shutil.copytree(first_release.MODEL, folder)
    monkeypatch.setattr(base_model, "MODEL_IMAGE_FOLDER", str(tmp_path / "mounted"))
    files = found(IMAGE)
    assert files.revision == found(str(folder)).revision
    assert fetched(files, tmp_path / "target") == folder
    assert not (tmp_path / "target").exists()
    assert downloaded(IMAGE, files.sizes) == 0


def test_another_model_in_an_image_counts_though_files_have_the_same_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tools that make images give every file the same time, so that digests don't change."""
    folder = tmp_path / "mounted"
    shutil.copytree(first_release.MODEL, folder)
    weights = folder / "model.safetensors"
    monkeypatch.setattr(base_model, "MODEL_IMAGE_FOLDER", str(folder))
    monkeypatch.setattr(base_model, "HASHED_BYTES", weights.stat().st_size - 1)
    revisions = set()
    for content in (weights.read_bytes(), weights.read_bytes()[::-1]):
        weights.write_bytes(content)
        os.utime(weights, (0, 0))
        revisions.add(found(IMAGE).revision)
    assert len(revisions) == 2


def test_an_image_that_nobody_mounted_is_explained() -> None:
    with pytest.raises(StageError) as caught:
        found(IMAGE)
    assert caught.value.reason is Reason.MODEL_NOT_FOUND
    assert f"{IMAGE} is not mounted" in caught.value.message


@pytest.mark.parametrize("source", [IMAGE, "oci://registry.example.com:5000/a/tiny@sha256:00"])
def test_files_are_named_for_the_images_repository(source: str) -> None:
    assert display_name(source) == "tiny"
    assert not base_model.is_hub(source)
