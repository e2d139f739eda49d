"""A model's revision changes with the files that are used, and with nothing beside them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_trainer.contract import Model, PreparedRunConfig, Reason, StageError, Storage
from finetune_trainer.model import base_model
from finetune_trainer.model.base_model import BaseModelFiles, former_folder_revision
from finetune_trainer.runtime.reporter import Reporter
from hack.object_store import Credentials
from tests.integration.trainer import first_release
from tests.integration.trainer.conftest import use_keys
from tests.integration.trainer.hub_server import COMMIT, hub_server

LATER = COMMIT[::-1]
SIZE = 8 << 20

Change = Callable[[Path], object]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A mounted model whose weights take 8 MiB."""
    folder = tmp_path / "model"
    shutil.copytree(first_release.MODEL, folder)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * (SIZE // 256))
    return folder


def find(folder: Path, *, trusted: bool = False) -> BaseModelFiles:
    return base_model.find(Model(source=str(folder), trust_remote_code=trusted), Storage())


def add(name: str, content: str = "text") -> Change:
    return lambda folder: (folder / name).write_text(content)


NOT_USED: dict[str, Change] = {
    "a card": add("README.md"),
    "a licence": add("LICENSE.txt", "another"),
    "a notice": add("NOTICE.txt"),
    "requirements": add("requirements.txt"),
    "a quantization": add("model-Q4_K_M.gguf"),
    "pickled weights": add("pytorch_model.bin"),
    "code that is not run": add("modeling_own.py"),
    "the weights once more": add("consolidated.safetensors"),
    "a picture": add("loss.png"),
}
USED: dict[str, Change] = {
    "the configuration": add("config.json", "{}"),
    "a vocabulary": add("vocab.txt"),
    "merges": add("merges.txt"),
    "a template": add("chat_template.jinja"),
    "further weights": add("model-00002.safetensors"),
    "a file less": lambda folder: (folder / "generation_config.json").unlink(),
}


@pytest.mark.parametrize("change", NOT_USED.values(), ids=NOT_USED)
def test_files_that_are_not_used_do_not_count(model: Path, change: Change) -> None:
    first = find(model)
    change(model)
    assert find(model).revision == first.revision
    assert first.commit is None


@pytest.mark.parametrize("change", USED.values(), ids=USED)
def test_files_that_are_used_count(model: Path, change: Change) -> None:
    first = find(model)
    change(model)
    assert find(model).revision != first.revision


def test_code_may_read_any_text(model: Path) -> None:
    first = find(model, trusted=True)
    add("own-words.txt")(model)
    assert find(model, trusted=True).revision != first.revision


def change_a_little(file: Path) -> None:
    """49 kB of 8 MiB, between the places where samples were taken."""
    with file.open("r+b") as stream:
        stream.seek(SIZE // 30)
        stream.write(bytes(49_000))


def test_a_small_part_of_the_weights_counts(model: Path) -> None:
    """Also where the file's time stays as it was. 0.1.0 took samples, and did not see it."""
    weights = model / "model.safetensors"
    times = weights.stat()
    first = find(model)
    former = former_folder_revision(first.model, Storage())
    change_a_little(weights)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert find(model).revision != first.revision
    assert former_folder_revision(first.model, Storage()) == former


def test_large_weights_count_by_size_and_time_of_change(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They aren't read: on a network volume that would take many minutes."""
    monkeypatch.setattr(base_model, "HASHED_BYTES", SIZE - 1)
    weights = model / "model.safetensors"
    first = find(model)
    weights.chmod(0o600)  # no change of the content
    assert find(model).revision == first.revision
    change_a_little(weights)
    assert find(model).revision != first.revision


def test_an_object_is_known_by_its_etag(
    moto: Credentials, bucket: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_keys(moto, monkeypatch)
    client, storage = moto.client(), Storage(endpoint=moto.endpoint)

    def revision(folder: str) -> str:
        return base_model.find(Model(source=f"s3://{bucket}/{folder}"), storage).revision

    for folder in ("first", "second"):
        for file in model.iterdir():
            client.upload_file(str(file), bucket, f"{folder}/{file.name}")
    client.put_object(Bucket=bucket, Key="second/LICENSE.txt", Body=b"another")
    assert revision("first") == revision("second")
    client.put_object(Bucket=bucket, Key="second/config.json", Body=b"{}")
    assert revision("first") != revision("second")


def on_hub(monkeypatch: pytest.MonkeyPatch, folder: Path, commit: str) -> BaseModelFiles:
    with hub_server(folder, commit) as endpoint:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        return base_model.find(Model(source="public/tiny"), Storage())


@pytest.mark.parametrize("change", NOT_USED.values(), ids=NOT_USED)
def test_a_commit_that_changes_nothing_used_trains_nothing_anew(
    model: Path, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    first = on_hub(monkeypatch, model, COMMIT)
    change(model)
    second = on_hub(monkeypatch, model, LATER)
    assert (first.revision, first.commit) == (second.revision, COMMIT)
    assert second.commit == LATER


@pytest.mark.parametrize("change", USED.values(), ids=USED)
def test_a_commit_that_changes_what_is_used_counts(
    model: Path, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    first = on_hub(monkeypatch, model, COMMIT)
    change(model)
    assert on_hub(monkeypatch, model, LATER).revision != first.revision


def prepared(source: str, revision: str, commit: str | None) -> PreparedRunConfig:
    return PreparedRunConfig.model_validate(
        {
            "model": {"source": source},
            "dataset": {"source": "/data/rows.csv"},
            "output": {"uri": "/output"},
            "resolved": {
                "fingerprints": {"prepare": "p", "train": "t", "export": "e"},
                "datasetETag": "etag",
                "datasetRows": 1,
                "modelRevision": revision,
                "modelCommit": commit,
            },
        }
    )


@pytest.mark.parametrize("commit", [COMMIT, None], ids=["today", "0.1.0"])
def test_the_commit_that_prepare_saw_is_downloaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commit: str | None
) -> None:
    """0.1.0 resolved a Hub model's revision to its commit."""
    found = on_hub(monkeypatch, model, COMMIT)
    run = prepared("public/tiny", found.revision if commit else COMMIT, commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub_server(model) as endpoint:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        folder = base_model.fetch_resolved(run, tmp_path / "target", Reporter())
    assert folder.path.name == COMMIT
    assert (folder.path / "model.safetensors").stat().st_size == SIZE


def test_a_model_that_was_replaced_is_not_trained(model: Path, tmp_path: Path) -> None:
    run = prepared(str(model), find(model).revision, None)
    assert base_model.fetch_resolved(run, tmp_path, Reporter()).path == model
    change_a_little(model / "model.safetensors")
    with pytest.raises(StageError) as caught:
        base_model.fetch_resolved(run, tmp_path, Reporter())
    assert caught.value.reason is Reason.MODEL_NOT_FOUND
    assert "somebody replaced them meanwhile" in caught.value.message
