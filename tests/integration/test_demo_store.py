"""The program of the chart's object store, with the server that its image has."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from hack import REPOSITORY
from hack.object_store import SERVICES, SOCKETS, Credentials, lasting_ports, weed
from hack.process import wait_until

SERVE = REPOSITORY / "images" / "demo-store" / "serve.py"
KEYS = {"AWS_ACCESS_KEY_ID": "an-id", "AWS_SECRET_ACCESS_KEY": "a-secret"}
ROWS = b"instruction,response\na,b\n"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Credentials]]:
    for bucket, name in (("datasets", "rows.csv"), ("models", "base/config.json")):
        file = tmp_path / "seed" / bucket / name
        file.parent.mkdir(parents=True)
        file.write_bytes(ROWS)
    for name in ("data", "scratch"):
        (tmp_path / name).mkdir()
    names = [f"{service}.port{kind}" for service in SERVICES for kind in ("", ".grpc")]
    ports = dict(zip(names, lasting_ports("127.0.0.1", len(names)), strict=True))
    endpoint = f"http://127.0.0.1:{ports['s3.port']}"
    folders = {name.upper(): str(tmp_path / name) for name in ("data", "seed", "scratch")}
    path = os.pathsep.join([str(Path(weed()).parent), os.environ["PATH"]])
    options = [f"-{name}={port}" for name, port in ports.items()]
    process = subprocess.Popen(
        [sys.executable, str(SERVE), "-ip.bind=127.0.0.1", *options],
        env={**os.environ, **KEYS, **folders, "ENDPOINT": endpoint, "PATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until((tmp_path / "scratch" / "ready").exists, what="the demo store", seconds=90)
        yield process, Credentials(endpoint, *KEYS.values())
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(timeout=60)
        for port in ports.values():
            for left_over in SOCKETS.glob(f"seaweedfs-*-{port}.sock"):
                left_over.unlink(missing_ok=True)


def test_it_serves_the_examples_data_to_who_has_the_keys(
    served: tuple[subprocess.Popen[bytes], Credentials],
) -> None:
    process, known = served
    s3 = known.client()
    assert [each["Name"] for each in s3.list_buckets()["Buckets"]] == [
        "artifacts",
        "datasets",
        "models",
    ]
    for bucket, key in (("datasets", "rows.csv"), ("models", "base/config.json")):
        assert s3.get_object(Bucket=bucket, Key=key)["Body"].read() == ROWS
    s3.put_object(Bucket="artifacts", Key="mine", Body=b"x")
    with pytest.raises(ClientError, match=r"403|Denied|Invalid|Signature"):
        Credentials(known.endpoint, "an-id", "another").client().list_buckets()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) in (0, -signal.SIGTERM)
