"""An S3 server with the example's data, to try finetune-operator with: SeaweedFS, filled once.

It takes the keys of its one user from the variables that S3 clients take them from. /tmp/ready is
there once clients can begin. Arguments are further options of `weed mini`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

DATA, SEED, SCRATCH = (
    Path(os.environ.get(name, default))
    for name, default in (("DATA", "/data"), ("SEED", "/seed"), ("SCRATCH", "/tmp"))  # noqa: S108 - the pod's own
)
ENDPOINT = os.environ.get("ENDPOINT", "http://127.0.0.1:8333")
BUCKETS = ("datasets", "models", "artifacts")
OPTIONS = {
    "ip": "127.0.0.1",
    "ip.bind": "0.0.0.0",  # noqa: S104 - a pod is reached by its address
    "s3.autoCreateBucket": "false",  # a missing bucket is an error, as it is elsewhere
    "s3.port.iceberg": "0",
    "s3.port.lance": "0",
    "webdav": "false",
    "admin.ui": "false",
    "master.telemetry": "false",
}


def command() -> list[str]:
    """The server's command line; its keys lie in a file."""
    keys = {
        "accessKey": os.environ["AWS_ACCESS_KEY_ID"],
        "secretKey": os.environ["AWS_SECRET_ACCESS_KEY"],
    }
    user = {"name": "demo", "credentials": [keys], "actions": ["Admin"]}
    file = SCRATCH / "keys.json"
    file.touch(mode=0o600)
    file.write_text(json.dumps({"identities": [user]}))
    options = {"dir": DATA, "s3.config": file, **OPTIONS}
    given = [f"-{name}={value}" for name, value in options.items()]
    return ["weed", "-logtostderr=true", "mini", *given, *sys.argv[1:]]


def fill() -> None:
    """Make the buckets and upload what is not there; what is there keeps its ETag."""
    settings = Config(connect_timeout=5, read_timeout=60, s3={"addressing_style": "path"})
    region = "us-east-1"
    s3 = boto3.client("s3", endpoint_url=ENDPOINT, region_name=region, config=settings)
    known = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
    for bucket in BUCKETS:
        if bucket not in known:
            s3.create_bucket(Bucket=bucket)
    for file in sorted(path for path in SEED.rglob("*") if path.is_file()):
        bucket, _, key = file.relative_to(SEED).as_posix().partition("/")
        held = s3.list_objects_v2(Bucket=bucket, Prefix=key).get("Contents", [])
        if not any(o["Key"] == key and o["Size"] == file.stat().st_size for o in held):
            s3.upload_file(str(file), bucket, key)
            print(f"Put {key} into {bucket}.", flush=True)


def main() -> int:
    """Serve until told to end."""
    ready = SCRATCH / "ready"
    ready.unlink(missing_ok=True)
    server = subprocess.Popen(command())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: server.send_signal(number))
    while server.poll() is None and not ready.exists():
        try:
            fill()
            ready.touch()
        except (BotoCoreError, ClientError) as error:
            print(f"Not ready yet: {error}", flush=True)
            time.sleep(1)
    return server.wait()


if __name__ == "__main__":
    sys.exit(main())
