"""Credentials of a pod's identity, and what it means that there are none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_trainer.contract import (
    Reason,
    StageError,
    Storage,
)
from finetune_trainer.store import Folder, open_folder
from finetune_trainer.store.s3_client import client
from hack.object_store import Credentials
from tests.integration.trainer.sts_server import Sts, sts_server

pytestmark = pytest.mark.usefixtures("bare_environment")


@pytest.fixture
def sts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sts]:
    """A pod's identity: a token that STS takes, or not."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    token = tmp_path / "token"
    token.write_text("a token of the ServiceAccount")
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/models")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
    with sts_server() as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", running.endpoint)
        client.cache_clear()
        yield running
    client.cache_clear()


def bucket_folder(moto: Credentials, bucket: str) -> Folder:
    return open_folder(f"s3://{bucket}/identity", Storage(endpoint=moto.endpoint))


def test_a_token_of_the_service_account_gets_keys(sts: Sts, moto: Credentials, bucket: str) -> None:
    folder = bucket_folder(moto, bucket)
    folder.write("a", b"1")
    assert folder.read("a") == b"1"
    assert sts.requests == 1
    assert sts.last["WebIdentityToken"] == ["a token of the ServiceAccount"]


@pytest.mark.parametrize(
    ("status", "code"),
    [(403, "AccessDenied"), (400, "InvalidIdentityToken"), (400, "ExpiredTokenException")],
)
def test_a_refused_token_names_the_service_account(
    sts: Sts, moto: Credentials, bucket: str, status: int, code: str
) -> None:
    sts.refuse = (status, code)
    with pytest.raises(StageError, match=code) as said:
        bucket_folder(moto, bucket).read("a")
    assert said.value.reason is Reason.STORAGE_ACCESS_DENIED
    assert "spec.serviceAccountName" in said.value.message
    assert not said.value.reason.retryable
    assert sts.requests == 1, "it is not asked again"


def test_sts_that_is_down_is_no_denial(sts: Sts, moto: Credentials, bucket: str) -> None:
    sts.refuse = (503, "ServiceUnavailable")
    with pytest.raises(StageError, match="AssumeRoleWithWebIdentity") as said:
        bucket_folder(moto, bucket).read("a")
    assert said.value.reason is Reason.STORAGE_UNAVAILABLE


def test_a_token_that_is_not_there_names_the_service_account(
    sts: Sts, moto: Credentials, bucket: str, tmp_path: Path
) -> None:
    (tmp_path / "token").unlink()
    with pytest.raises(StageError, match=r"No such file.*spec\.serviceAccountName") as said:
        bucket_folder(moto, bucket).download("a", tmp_path / "a")
    assert said.value.reason is Reason.STORAGE_ACCESS_DENIED
    assert sts.requests == 0


def test_a_program_for_credentials_that_fails_names_the_service_account(
    moto: Credentials, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    config = tmp_path / "config"
    config.write_text("[default]\ncredential_process = sh -c 'echo no such role >&2; exit 3'\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    client.cache_clear()
    with pytest.raises(StageError, match=r"no such role.*spec\.serviceAccountName") as said:
        bucket_folder(moto, bucket).read("a")
    assert said.value.reason is Reason.STORAGE_ACCESS_DENIED
    client.cache_clear()
