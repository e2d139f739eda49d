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
from finetune_trainer.store import open_folder
from finetune_trainer.store.s3_client import client, find_address
from hack.object_store import Credentials, ObjectStore
from tests.integration.trainer.conftest import ROWS, Trainer, use_keys, write_csv
from tests.integration.trainer.s3_proxy import Fault, Proxy, Request, s3_proxy

pytestmark = pytest.mark.usefixtures("bare_environment")


@pytest.fixture
def proxy(moto: Credentials, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Before moto, whose bucket is there."""
    assert bucket == "trainer-bucket"
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
        open_folder("s3://trainer-bucket/x", Storage(endpoint=proxy.endpoint)).read("a")
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
        open_folder("s3://trainer-bucket/x", Storage(endpoint="http://other.invalid:8333")).read(
            "a"
        )
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
    folder = open_folder("s3://trainer-bucket/encrypted", settings)
    folder.delete([info.path for info in folder.list()])
    large = tmp_path / "large"
    large.write_bytes(os.urandom((8 << 20) + 1))
    folder.write("small", b"1")
    folder.create("owner", b"1")
    folder.upload(large, "large")

    def asked(request: Request) -> tuple[str | None, str | None]:
        key = request.headers.get("x-amz-server-side-encryption-aws-kms-key-id")
        return request.headers.get("x-amz-server-side-encryption"), key

    found = {each.operation: asked(each) for each in proxy.requests}
    for operation in ("PutObject", "CreateMultipartUpload"):
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
    folder = open_folder("s3://trainer-bucket/x", DatasetStorage(endpoint=proxy.endpoint))
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


# Names that lead out
