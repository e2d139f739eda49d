"""A tiny model, its data, and the output folder that version 0.1.0 made of them.

`tests/data/first_release` was written once by the code of 0.1.0: `inputs/` is a Llama of one layer
with random weights and 24 rows, `output/` the folder of `finetune-trainer run` on `run.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune_trainer.contract import RunConfig, StageResult
from finetune_trainer.prepare import prepare_stage
from finetune_trainer.runtime.reporter import Reporter
from hack.object_store import Credentials

ROOT = Path(__file__).parents[2] / "data" / "first_release"
MODEL, ROWS_FILE = ROOT / "inputs" / "model", ROOT / "inputs" / "rows.csv"
BUCKET = "first-release"


def first_config(endpoint: str) -> dict[str, Any]:
    """run.json of then."""
    config: dict[str, Any] = json.loads((ROOT / "run.json").read_text())
    return {**config, "storage": {"endpoint": endpoint}}


def upload(server: Credentials) -> None:
    """Put inputs and output into the bucket as they were left."""
    client = server.client()
    client.create_bucket(Bucket=BUCKET)
    for file in sorted(ROOT.rglob("*")):
        if file.is_file() and file.parent != ROOT:
            client.upload_file(str(file), BUCKET, file.relative_to(ROOT).as_posix())


def remove(server: Credentials) -> None:
    """Delete the bucket with all that is in it."""
    client = server.client()
    for key in keys(server):
        client.delete_object(Bucket=BUCKET, Key=key)
    client.delete_bucket(Bucket=BUCKET)


def keys(server: Credentials, prefix: str = "") -> dict[str, str]:
    listed = server.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix)
    return {item["Key"]: item["ETag"] for item in listed.get("Contents", [])}


def prepare(config: dict[str, Any], workspace: Path) -> StageResult:
    """`prepare` in this process; `workspace` is a folder for this once."""
    workspace.mkdir()
    return prepare_stage.run(RunConfig.model_validate(config), workspace, Reporter())
