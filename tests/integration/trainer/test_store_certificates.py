"""Certificates of a CA of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract import (
    Reason,
    StageError,
    Storage,
)
from finetune_trainer.store import open_folder
from hack.object_store import Credentials
from tests.integration.trainer.conftest import Trainer, use_keys
from tests.integration.trainer.hub_server import hub_server
from tests.integration.trainer.tls import Authority, https_front, make_authority

pytestmark = pytest.mark.usefixtures("bare_environment")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def https_store(moto: Credentials, authority: Authority) -> Iterator[str]:
    with https_front(moto.endpoint, authority) as address:
        yield address


def test_a_certificate_of_a_ca_that_nobody_knows_is_named(
    https_store: str, moto: Credentials, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_keys(moto, monkeypatch)
    folder = open_folder(f"s3://{bucket}/data", Storage(endpoint=https_store))
    with pytest.raises(StageError) as said:
        folder.read("train.csv")
    assert said.value.reason is Reason.STORAGE_UNAVAILABLE
    cause = "certificate verify failed: self-signed certificate in certificate chain"
    assert f"({cause}): where a CA" in said.value.message
    assert "spec.storage.caBundle" in said.value.message


def test_a_given_ca_is_trusted_for_the_store_and_the_hub(
    trainer: Trainer,
    run_config: dict[str, Any],
    https_store: str,
    authority: Authority,
    tiny_model: Path,
) -> None:
    run_config["storage"] = {"endpoint": https_store}
    run_config["model"] = {"source": "public/tiny"}
    run_config["export"] = {"gguf": []}
    with hub_server(tiny_model) as plain, https_front(plain, authority) as hub:
        trainer.environment |= {
            "HF_ENDPOINT": hub,
            "FINETUNE_CA_BUNDLES": f"spec.storage.caBundle={authority.bundle}",
        }
        run = trainer("prepare", run_config)
    assert run.code == 0, run.output
    merged = (trainer.folder / "workspace" / "ca-bundle.pem").read_text()
    assert authority.bundle.read_text() in merged
    assert merged.count("BEGIN CERTIFICATE") > 100, "beside the public ones"


@pytest.mark.parametrize(
    ("content", "reason", "said"),
    [
        (None, Reason.STORAGE_UNAVAILABLE, "No such file"),
        ("not a certificate", Reason.INVALID_CONFIG, "holds no certificates"),
        ("", Reason.INVALID_CONFIG, "holds no certificates"),
    ],
)
def test_a_bundle_that_holds_nothing_is_named(
    trainer: Trainer,
    run_config: dict[str, Any],
    content: str | None,
    reason: Reason,
    said: str,
) -> None:
    bundle = trainer.folder / "ca.crt"
    if content is not None:
        bundle.write_text(content)
    trainer.environment["FINETUNE_CA_BUNDLES"] = f"spec.dataset.storage.caBundle={bundle}"
    run = trainer("prepare", run_config)
    assert run.result is not None
    assert run.result.reason is reason
    assert said in run.result.message
    assert "spec.dataset.storage.caBundle" in run.result.message
    assert "Traceback" not in run.output
