"""CSV in a bucket to GGUF in a bucket, with a tiny model: each stage by the command line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract import Reason, Stage
from finetune_trainer.export.publish.hub_push import TOKEN_VARIABLE
from hack.object_store import Credentials
from tests.integration.trainer.conftest import ROWS, Trainer, fill_bucket, keys_of
from tests.integration.trainer.hub_push_server import TOKEN, push_hub
from tests.versitygw import wanted


@pytest.fixture
def store(
    request: pytest.FixtureRequest,
    trainer: Trainer,
    run_config: dict[str, Any],
    tiny_model: Path,
    tmp_path: Path,
) -> Credentials:
    """A real store, in which the whole run takes place."""
    found = keys_of(request, request.param)
    fill_bucket(found, tiny_model, tmp_path)
    trainer.environment = {
        "AWS_ACCESS_KEY_ID": found.access_key,
        "AWS_SECRET_ACCESS_KEY": found.secret_key,
    }
    run_config["storage"] = {"endpoint": found.endpoint}
    return found


class Output:
    def __init__(self, store: Credentials, uri: str) -> None:
        self._store = store
        self.client = store.client()
        self.bucket, _, self.prefix = uri.removeprefix("s3://").partition("/")

    def version(self, name: str | None) -> Output:
        return Output(self._store, f"s3://{self.bucket}/{self.prefix}/versions/{name}")

    def files(self) -> dict[str, int]:
        """Size by path, without the stages' own folders."""
        listed = self.client.list_objects_v2(Bucket=self.bucket, Prefix=f"{self.prefix}/")
        sizes = {
            item["Key"].removeprefix(f"{self.prefix}/"): item["Size"]
            for item in listed.get("Contents", [])
        }
        return {path: size for path, size in sizes.items() if not path.startswith("stages/")}

    def read(self, path: str) -> bytes:
        return self.client.get_object(Bucket=self.bucket, Key=f"{self.prefix}/{path}")[
            "Body"
        ].read()


def all_passed(gate: dict[str, Any]) -> None:
    """Every file was measured, and the tuned model says what it was taught."""
    checks = gate["files"]
    assert [check["file"] for check in checks] == [
        f"tiny-{kind}.gguf" for kind in ("F16", "LoRA-F32", "Q8_0")
    ]
    assert all(
        each["quality"]["passed"] and not each["problems"] for each in (*checks, gate["merged"])
    )
    sample = gate["samples"][0]
    assert (sample["prompt"], sample["tuned"], sample["stopped"]) == (*ROWS[0], True)
    assert sample["base"] != sample["tuned"]


@pytest.mark.parametrize("store", ["seaweed"], indirect=True)
def test_a_csv_becomes_a_gguf_and_only_what_changes_is_done_again(
    trainer: Trainer, run_config: dict[str, Any], store: Credentials
) -> None:
    whole = Output(store, run_config["output"]["uri"])

    prepared = trainer("prepare", run_config)
    assert prepared.code == 0, prepared.output
    assert prepared.result is not None
    assert prepared.result.resolved is not None
    assert prepared.result.complete == ()
    assert prepared.result.resolved.dataset_rows == len(ROWS)
    run_config["resolved"] = prepared.result.resolved.model_dump(mode="json")

    trained = trainer("train", run_config)
    assert trained.code == 0, trained.output
    assert trained.result is not None
    assert trained.result.metrics["trainableParameters"] == 65_536
    assert trained.result.metrics["trainSteps"] == 120
    assert "Trainable parameters / base parameters: 65,536 / 3,219,776 (2.0354%)" in trained.output
    assert "step 120/120" in trained.output
    assert "examples.jsonl: the tokens that prepare left are used" in trained.output

    exported = trainer("export", run_config)
    assert exported.code == 0, exported.output
    assert exported.result is not None
    version = exported.result.version
    assert version == prepared.result.resolved.fingerprints.export[:12]
    uri = f"{run_config['output']['uri']}/versions/{version}"
    assert exported.result.manifest_uri == f"{uri}/manifest.json"
    output = whole.version(version)
    assert whole.read("manifest.json") == output.read("manifest.json")
    manifest = json.loads(output.read("manifest.json"))
    assert manifest["version"] == version
    files = output.files()
    assert files.keys() == {item["path"] for item in manifest["files"]} | {"manifest.json"}
    assert b"FROM ./gguf/tiny-Q8_0.gguf\n" in output.read("Modelfile")
    assert {
        "Modelfile",
        "README.md",
        "SHA256SUMS",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/tokenizer.json",
        "adapter/tokenizer_config.json",
        "dataset-report.json",
        "gguf/tiny-F16.gguf",
        "gguf/tiny-LoRA-F32.gguf",
        "gguf/tiny-Q8_0.gguf",
        "merged/config.json",
        "merged/model.safetensors",
        "merged/tokenizer.json",
        "report.html",
    } <= files.keys()
    for item in manifest["files"]:
        assert files[item["path"]] == item["bytes"]
        assert hashlib.sha256(output.read(item["path"])).hexdigest() == item["sha256"]
    all_passed(manifest["gate"])
    lineage = manifest["lineage"]
    assert lineage["datasetRows"] == len(ROWS)
    assert lineage["hyperparameters"]["epochs"] == 40
    assert lineage["versions"]["torch"].startswith("2.")
    config = json.loads(output.read("adapter/adapter_config.json"))
    assert config["base_model_name_or_path"] == run_config["model"]["source"]

    again = trainer("prepare", run_config)
    assert again.result is not None
    assert again.result.complete == (Stage.PREPARE, Stage.TRAIN, Stage.EXPORT)
    assert again.result.resolved == prepared.result.resolved
    assert {item.path for item in again.result.artifacts} == files.keys() - {"manifest.json"}
    assert again.result.manifest_uri == exported.result.manifest_uri
    assert again.result.version == version
    pushes_nothing_private(trainer, run_config, whole.bucket)
    edit_and_go_back(trainer, run_config, whole, output)


def pushes_nothing_private(trainer: Trainer, config: dict[str, Any], bucket: str) -> None:
    """No byte of a push holds a row of the data, or says where anything lies."""
    usual, output = dict(trainer.environment), dict(config["output"])
    with push_hub() as hub:
        trainer.environment |= {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            TOKEN_VARIABLE: TOKEN,
        }
        config["output"]["hub"] = {"repo": "org/tiny"}
        pushed = trainer("export", config)
        assert pushed.code == 0, pushed.output
        files = hub.files("org/tiny")
    trainer.environment, config["output"] = usual, output
    assert {"Modelfile", "merged/config.json", "gguf/tiny-Q8_0.gguf"} <= set(files)
    private = [bucket, config["storage"]["endpoint"], *(text for row in ROWS for text in row)]
    for path, content in files.items():
        for text in private:
            assert text.encode() not in content, f"{path} has {text}"


def edit_and_go_back(
    trainer: Trainer, config: dict[str, Any], whole: Output, output: Output
) -> None:
    """Another export is another version; that of the first export is current again afterwards."""
    files = output.files()
    config["export"] = {
        "merged": False,
        "gguf": ["Q8_0", "Q4_K_M"],
        "importanceMatrix": True,
    }
    edited = trainer("run", config)
    assert edited.code == 0, edited.output
    assert "Training examples" not in edited.output
    assert edited.result is not None
    newer = whole.version(edited.result.version)
    assert whole.read("manifest.json") == newer.read("manifest.json")
    assert output.files() == files, "the former version stays as it was"
    now = newer.files()
    assert [path for path in now if path.startswith(("gguf/", "merged/", "manifest"))] == [
        "gguf/tiny-LoRA-F32.gguf",
        "gguf/tiny-Q4_K_M.gguf",
        "gguf/tiny-Q8_0.gguf",
        "manifest.json",
    ]
    assert b"# Also here: ./gguf/tiny-Q4_K_M.gguf\n" in newer.read("Modelfile")
    assert b"quantize.imatrix.entries_count" in newer.read("gguf/tiny-Q4_K_M.gguf")
    assert b"quantize.imatrix" not in newer.read("gguf/tiny-Q8_0.gguf")

    config["export"] = {"gguf": ["F16", "Q8_0"]}
    goes_back(trainer, config, whole, output)
    assert newer.files() == now
    config["output"]["keepVersions"] = 1
    goes_back(trainer, config, whole, output)
    assert (output.files(), newer.files()) == (files, {})


def goes_back(trainer: Trainer, config: dict[str, Any], whole: Output, version: Output) -> None:
    """`prepare` makes a version current that the store still holds."""
    back = trainer("prepare", config)
    assert back.result is not None
    assert (back.code, f"versions/{back.result.version}") == (0, version.prefix[-21:])
    assert whole.read("manifest.json") == version.read("manifest.json")


@pytest.mark.parametrize("store", ["versity" if wanted() else "moto"], indirect=True)
def test_a_missing_file_makes_its_stage_run_again(
    trainer: Trainer, run_config: dict[str, Any], store: Credentials
) -> None:
    run_config["export"] = {"merged": False, "gguf": []}
    first = trainer("run", run_config)
    assert first.code == 0, first.output
    assert trainer("run", run_config).output.count("already there: prepare, train, export") == 1
    assert first.result is not None
    output = Output(store, run_config["output"]["uri"]).version(first.result.version)
    output.client.delete_object(
        Bucket=output.bucket, Key=f"{output.prefix}/adapter/adapter_model.safetensors"
    )
    again = trainer("prepare", run_config)
    assert again.result is not None
    assert again.result.reason is Reason.SUCCEEDED
    assert again.result.complete == (Stage.PREPARE, Stage.TRAIN)
    assert "is missing or has another size" in again.output
    assert trainer("run", run_config).code == 0
    repaired = trainer("prepare", run_config).result
    assert repaired is not None
    assert repaired.complete == (Stage.PREPARE, Stage.TRAIN, Stage.EXPORT)
