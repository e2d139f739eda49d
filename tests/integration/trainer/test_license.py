"""The base model's card is fetched for its license, and is nothing that a training depends on."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_trainer.contract import Model, Storage
from finetune_trainer.export.report import license_of
from finetune_trainer.model import base_model
from finetune_trainer.runtime.reporter import Reporter
from hack.object_store import Credentials
from tests.integration.trainer.conftest import use_keys

CARD = b"---\nlicense: apache-2.0\n---\n# tiny\n"
SMALL = {"config.json": b"{}", "tokenizer.json": b"{}"}
FILES = {**SMALL, "model.safetensors": b"weights", "README.md": CARD}


def test_the_license_comes_with_the_weights(
    moto: Credentials, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_keys(moto, monkeypatch)
    for name, content in FILES.items():
        moto.client().put_object(Bucket=bucket, Key=f"with-card/{name}", Body=content)
    storage = Storage(endpoint=moto.endpoint)
    files = base_model.find(Model(source=f"s3://{bucket}/with-card"), storage)

    small = base_model.fetch(files, storage, tmp_path / "small", Reporter(), weights=False)
    assert {file.name for file in small.path.iterdir()} == set(SMALL)
    whole = base_model.fetch(files, storage, tmp_path / "whole", Reporter(), weights=True)
    assert {file.name for file in whole.path.iterdir()} == set(FILES)
    assert license_of(whole.path) == "apache-2.0"


def test_another_text_in_the_card_trains_nothing_anew(tmp_path: Path) -> None:
    def revision() -> str:
        return base_model.find(Model(source=str(tmp_path)), Storage()).revision

    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    first = revision()
    (tmp_path / "README.md").write_text("another")
    assert revision() == first
    (tmp_path / "README.md").unlink()
    assert revision() == first
    (tmp_path / "tokenizer.json").write_text('{"a": 1}')
    assert revision() != first
