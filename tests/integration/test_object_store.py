"""The object store is a real one: it checks keys, names what is missing, and keeps its data."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from hack.object_store import ObjectStore, object_store
from hack.process import ClusterError
from tests.fixtures import moto_server

MEBIBYTE = 1024 * 1024


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("store")) as running:
        running.create_bucket("bucket")
        yield running


def refused(call: Callable[[], Any]) -> tuple[str, int]:
    with pytest.raises(ClientError) as caught:
        call()
    response = caught.value.response
    return response["Error"]["Code"], response["ResponseMetadata"]["HTTPStatusCode"]


def test_wrong_keys_are_refused(store: ObjectStore) -> None:
    wrong_secret = dataclasses.replace(store.credentials, secret_key="wrong").client()
    unknown_user = dataclasses.replace(store.credentials, access_key="nobody").client()
    listing = refused(lambda: wrong_secret.list_objects_v2(Bucket="bucket"))
    assert listing == ("SignatureDoesNotMatch", 403)
    writing = refused(lambda: unknown_user.put_object(Bucket="bucket", Key="a", Body=b""))
    assert writing == ("InvalidAccessKeyId", 403)


def test_what_is_missing_is_named(store: ObjectStore) -> None:
    s3 = store.client()
    assert refused(lambda: s3.get_object(Bucket="bucket", Key="no")) == ("NoSuchKey", 404)
    assert refused(lambda: s3.list_objects_v2(Bucket="nowhere")) == ("NoSuchBucket", 404)
    uploading = refused(lambda: s3.put_object(Bucket="nowhere", Key="a", Body=b""))
    assert uploading == ("NoSuchBucket", 404)


def test_a_second_writer_of_the_same_key_is_refused_on_demand(store: ObjectStore) -> None:
    s3 = store.client()
    s3.put_object(Bucket="bucket", Key="lock", Body=b"1", IfNoneMatch="*")
    second = refused(lambda: s3.put_object(Bucket="bucket", Key="lock", Body=b"2", IfNoneMatch="*"))
    assert second == ("PreconditionFailed", 412)


def test_data_and_endpoint_survive_a_restart_byte_for_byte(tmp_path: Path) -> None:
    data = os.urandom(40 * MEBIBYTE + 1)  # five parts of boto3's multipart upload and a bit
    (tmp_path / "up").write_bytes(data)
    with object_store(tmp_path / "state") as store:
        store.create_bucket("bucket")
        store.client().upload_file(str(tmp_path / "up"), "bucket", "a/b.bin")
        before = store.credentials
        assert store.start() == before, "a second start finds the first"

    assert not store.healthy()
    with object_store(tmp_path / "state") as store:
        assert store.credentials == before
        store.create_bucket("bucket")
        store.client().download_file("bucket", "a/b.bin", str(tmp_path / "down"))
        assert (tmp_path / "down").read_bytes() == data
        keys = tmp_path / "state" / "object-store-keys.json"
        assert stat.S_IMODE(keys.stat().st_mode) == 0o600

    store.remove()
    assert not store.data.exists()
    with pytest.raises(ClusterError, match="no object store was started"):
        _ = store.credentials


def test_moto_serves_the_same_client() -> None:
    with moto_server() as credentials:
        s3 = credentials.client()
        s3.create_bucket(Bucket="bucket")
        assert refused(lambda: s3.get_object(Bucket="bucket", Key="no")) == ("NoSuchKey", 404)
