"""What spec.storage says, and the environment where it says nothing, as it reaches the wire."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract import (
    DatasetStorage,
    Encryption,
    ModelStorage,
    Reason,
    StageError,
    Storage,
)
from finetune_trainer.store import Folder, open_folder
from finetune_trainer.store.s3_client import client, find_address
from hack.object_store import Credentials, ObjectStore
from tests.integration.trainer.conftest import ROWS, Trainer, use_keys, write_csv
from tests.integration.trainer.hub_server import hub_server
from tests.integration.trainer.s3_proxy import Fault, Proxy, Request, s3_proxy
from tests.integration.trainer.sts_server import Sts, sts_server
from tests.integration.trainer.tls import Authority, https_front, make_authority

REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*REGIONS, "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "HTTP_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff._MAX_BACKOFF", 0.05)


@pytest.fixture
def proxy(moto: Credentials, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Before moto, whose bucket is there."""
    assert bucket == "trainer"
    use_keys(moto, monkeypatch)
    with s3_proxy(moto.endpoint) as running:
        yield running


# Where the store is


def url(settings: Storage) -> str:
    """Where a request would go."""
    found = client(find_address(settings)).generate_presigned_url(
        "get_object", Params={"Bucket": "my-bucket", "Key": "a"}
    )
    return found.partition("?")[0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Storage(), "https://my-bucket.s3.amazonaws.com/a"),
        (Storage(path_style=True), "https://s3.amazonaws.com/my-bucket/a"),
        (Storage(endpoint="https://store.example"), "https://store.example/my-bucket/a"),
        (
            Storage(endpoint="https://store.example", path_style=False),
            "https://my-bucket.store.example/a",
        ),
    ],
)
def test_a_bucket_is_in_the_path_or_in_the_host(
    settings: Storage, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_keys(Credentials("", "key", "secret"), monkeypatch)
    assert url(settings) == expected


@pytest.mark.parametrize(
    ("settings", "environment", "expected"),
    [
        (Storage(region="eu-west-1"), {"AWS_REGION": "a"}, ("eu-west-1", "spec.storage.region")),
        (
            Storage(),
            {"AWS_REGION": "eu-north-1", "AWS_DEFAULT_REGION": "b"},
            ("eu-north-1", "AWS_REGION"),
        ),
        (Storage(), {"AWS_DEFAULT_REGION": "eu-south-1"}, ("eu-south-1", "AWS_DEFAULT_REGION")),
        (Storage(), {}, ("us-east-1", "the default")),
        (
            DatasetStorage(region="eu-west-3"),
            {},
            ("eu-west-3", "spec.dataset.storage.region"),
        ),
    ],
)
def test_the_region_is_the_environments_where_the_spec_names_none(
    settings: Storage,
    environment: dict[str, str],
    expected: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    use_keys(Credentials("", "key", "secret"), monkeypatch)
    address = find_address(settings)
    assert (address.region, address.region_source) == expected
    assert client(address).meta.region_name == expected[0]
    assert expected[1] in address.where


def test_another_region_is_named_with_where_it_came_from(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    proxy.choose = lambda _: Fault(refuse=(400, "AuthorizationHeaderMalformed"))
    with pytest.raises(StageError, match="region 'eu-north-1', which came from AWS_REGION") as said:
        open_folder("s3://trainer/x", Storage(endpoint=proxy.endpoint)).read("a")
    assert said.value.reason is Reason.INVALID_CONFIG


@pytest.mark.parametrize("by", ["the spec", "the Secret"])
def test_a_password_in_the_endpoint_is_refused_and_not_shown(
    by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = "https://me:opensesame@store.example:9000"
    settings = Storage(endpoint=endpoint) if by == "the spec" else Storage()
    if by == "the Secret":
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    with pytest.raises(StageError, match="has a user or password in it") as said:
        open_folder("s3://bucket/x", settings)
    assert said.value.reason is Reason.INVALID_CONFIG
    assert "opensesame" not in said.value.message
    assert "me:" not in said.value.message


def test_requests_go_through_the_environments_proxy(
    seaweed: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_keys(seaweed.credentials, monkeypatch)
    seaweed.create_bucket("proxied")
    # Nobody knows this host but the proxy.
    unknown = "http://store.invalid:8333"
    with s3_proxy(seaweed.endpoint) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.endpoint)
        folder = open_folder("s3://proxied/a", Storage(endpoint=unknown))
        folder.write("a", b"1")
        assert folder.read("a") == b"1"
        assert {each.headers["host"] for each in proxy.requests} == {"store.invalid:8333"}
    monkeypatch.setenv("NO_PROXY", "other.invalid,.company.example")
    with pytest.raises(StageError, match="EndpointConnectionError") as said:
        open_folder("s3://trainer/x", Storage(endpoint="http://other.invalid:8333")).read("a")
    assert said.value.reason is Reason.STORAGE_UNAVAILABLE
    assert "proxies" in said.value.message


# What every write carries


@pytest.mark.parametrize(
    ("encryption", "expected"),
    [
        (None, (None, None)),
        (Encryption(algorithm="AES256"), ("AES256", None)),
        (
            Encryption(algorithm="aws:kms", kms_key_id="alias/models"),
            ("aws:kms", "alias/models"),
        ),
    ],
)
def test_writes_ask_for_encryption(
    proxy: Proxy,
    tmp_path: Path,
    encryption: Encryption | None,
    expected: tuple[str | None, str | None],
) -> None:
    settings = Storage(endpoint=proxy.endpoint, encryption=encryption)
    folder = open_folder("s3://trainer/encrypted", settings)
    folder.delete([info.path for info in folder.list()])
    large = tmp_path / "large"
    large.write_bytes(os.urandom((8 << 20) + 1))
    folder.write("small", b"1")
    folder.create("owner", b"1")
    folder.upload(large, "large")
    folder.copy("small", "copy")
    assert folder.read("copy") == b"1"

    def asked(request: Request) -> tuple[str | None, str | None]:
        key = request.headers.get("x-amz-server-side-encryption-aws-kms-key-id")
        return request.headers.get("x-amz-server-side-encryption"), key

    found = {each.operation: asked(each) for each in proxy.requests}
    for operation in ("PutObject", "CreateMultipartUpload", "CopyObject"):
        assert found[operation] == expected, operation
    assert found["UploadPart"] == (None, None)


# Who asks


def test_a_store_of_its_own_takes_nothing_from_the_main_one(
    monkeypatch: pytest.MonkeyPatch, proxy: Proxy
) -> None:
    """Neither the endpoint that came with the main Secret, nor its keys."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://main.example")
    assert url(Storage()) == "http://main.example/my-bucket/a"
    for settings in (DatasetStorage(), ModelStorage()):
        found = client(find_address(settings))
        assert found.meta.endpoint_url == "https://s3.amazonaws.com"
        assert find_address(settings).keys is None
    folder = open_folder("s3://trainer/x", DatasetStorage(endpoint=proxy.endpoint))
    with pytest.raises(StageError, match=r"spec\.dataset\.storage\.secretRef") as said:
        folder.read("a")
    assert said.value.reason is Reason.STORAGE_ACCESS_DENIED
    assert proxy.requests == [], "nothing was sent with the main store's keys"


def test_half_a_pair_of_keys_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_MODEL_AWS_ACCESS_KEY_ID", "key")
    with pytest.raises(StageError, match=r"spec\.model\.storage\.secretRef has only one"):
        open_folder("s3://bucket/x", ModelStorage())


def test_dataset_model_and_output_in_three_stores(
    trainer: Trainer,
    run_config: dict[str, Any],
    seaweed: ObjectStore,
    versity: Credentials,
    moto: Credentials,
) -> None:
    """Two of them refuse the keys of any other."""
    seaweed.create_bucket("datasets")
    file = trainer.folder / "rows.csv"
    write_csv(file, ROWS[:4])
    seaweed.client().upload_file(str(file), "datasets", "train.csv")
    write_csv(file, ROWS[4:])
    seaweed.client().upload_file(str(file), "datasets", "held-out.csv")
    versity.client().create_bucket(Bucket="outputs")
    run_config["dataset"] = {
        "source": "s3://datasets/train.csv",
        "evalSource": "s3://datasets/held-out.csv",
        "storage": {"endpoint": seaweed.endpoint},
    }
    run_config["model"]["storage"] = {}
    run_config["output"] = {"uri": "s3://outputs/run"}
    run_config["storage"] = {}
    run_config["export"] = {"gguf": []}
    trainer.environment = {
        "AWS_ACCESS_KEY_ID": versity.access_key,
        "AWS_SECRET_ACCESS_KEY": versity.secret_key,
        "AWS_ENDPOINT_URL_S3": versity.endpoint,
        "FINETUNE_DATASET_AWS_ACCESS_KEY_ID": seaweed.access_key,
        "FINETUNE_DATASET_AWS_SECRET_ACCESS_KEY": seaweed.secret_key,
        "FINETUNE_MODEL_AWS_ACCESS_KEY_ID": moto.access_key,
        "FINETUNE_MODEL_AWS_SECRET_ACCESS_KEY": moto.secret_key,
        "FINETUNE_MODEL_AWS_ENDPOINT_URL_S3": moto.endpoint,
    }
    run = trainer("prepare", run_config)
    assert run.code == 0, run.output
    assert run.result is not None
    assert run.result.resolved is not None
    assert (run.result.resolved.dataset_rows, run.result.resolved.eval_rows) == (4, 2)
    listed = versity.client().list_objects_v2(Bucket="outputs", Prefix="run/stages/prepare/")
    assert any(item["Key"].endswith("complete.json") for item in listed["Contents"])


# Workload identity


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


# A CA of one's own


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


# Names that lead out


def test_a_key_that_leads_out_of_its_folder_is_refused(
    moto: Credentials, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_keys(moto, monkeypatch)
    put = moto.client().put_object
    put(Bucket=bucket, Key="evil/adapter/good.txt", Body=b"1")
    put(Bucket=bucket, Key="evil/adapter/../../evil.py", Body=b"print('evil')")
    folder = open_folder(f"s3://{bucket}/evil", Storage(endpoint=moto.endpoint))
    target = tmp_path / "work" / "target"
    with pytest.raises(StageError, match=r"evil/adapter/\.\./\.\./evil\.py has a name that leads"):
        folder.download_tree("adapter", target)
    assert list(tmp_path.rglob("*")) == []
