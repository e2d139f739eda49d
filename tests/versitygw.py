"""versitygw, an S3 server over a folder: the second real store of the tests.

It is no dependency of the project. The program is the one that the variable VERSITYGW names, or
the one on PATH.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from botocore.exceptions import BotoCoreError, ClientError

from hack.object_store import Credentials, lasting_ports
from hack.process import Unavailable, wait_until

VARIABLE = "VERSITYGW"
ADDRESS = "127.0.0.1"


def wanted() -> bool:
    """Whether it is here, or has to be."""
    found = shutil.which(os.environ.get(VARIABLE) or "versitygw")
    return found is not None or os.environ.get("CI") == "true"


def program() -> str:
    """The program; raises Unavailable where there is none."""
    named = os.environ.get(VARIABLE) or "versitygw"
    found = shutil.which(named)
    if not found:
        raise Unavailable(f"there is no {named}: put it on PATH, or name it with {VARIABLE}")
    return found


@contextmanager
def versitygw(folder: Path) -> Iterator[Credentials]:
    """Run it over an empty folder, with keys of its own."""
    (port,) = lasting_ports(ADDRESS, 1)
    folder.mkdir(parents=True, exist_ok=True)
    keys = Credentials(f"http://{ADDRESS}:{port}", secrets.token_hex(10), secrets.token_hex(20))
    environment = {"ROOT_ACCESS_KEY": keys.access_key, "ROOT_SECRET_KEY": keys.secret_key}
    command = [program(), "--port", f"{ADDRESS}:{port}", "--quiet", "posix", str(folder)]
    with subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=sys.stderr, stderr=sys.stderr
    ) as process:
        try:
            wait_until(lambda: _answers(keys), what="versitygw", seconds=30)
            yield keys
        finally:
            process.terminate()


def _answers(keys: Credentials) -> bool:
    try:
        keys.client().list_buckets()
    except (BotoCoreError, ClientError):
        return False
    return True
