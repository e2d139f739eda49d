"""Bad input, by the command line: each ends soon, with its reason, exit code and a remedy."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.outcome import Reason
from tests.cluster.object_store import ObjectStore, object_store
from tests.cluster.s3 import Credentials
from tests.integration.trainer.conftest import Trainer
from tests.integration.trainer.hub_server import COMMIT, hub_server

CSV = Path(__file__).parents[2] / "data" / "csv"


def expect(
    trainer: Trainer, config: dict[str, Any], reason: Reason, code: int, *parts: str
) -> None:
    """Run prepare; it must fail within a minute, for the reason, and say so without a trace."""
    began = time.monotonic()
    run = trainer("prepare", config)
    assert time.monotonic() - began < 60
    assert run.result is not None, run.output
    assert (run.result.reason, run.code) == (reason, code), run.output
    for part in parts:
        assert part in run.result.message
    assert "Traceback" not in run.output
    assert "\n" not in run.result.message


@pytest.fixture
def upload(moto: Credentials, bucket: str) -> Any:
    def _upload(name: str) -> str:
        moto.client().upload_file(str(CSV / name), bucket, f"bad/{name}")
        return f"s3://{bucket}/bad/{name}"

    return _upload


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("empty.csv", (Reason.DATASET_EMPTY, "is empty")),
        ("header-only.csv", (Reason.DATASET_EMPTY, "no rows")),
        ("other-header.csv", (Reason.COLUMN_NOT_FOUND, "Did you mean 'Instruction'?")),
        ("blank-cells.csv", (Reason.INVALID_ROWS, "row 3: 'response' is blank")),
        ("latin-1.csv", (Reason.DATASET_UNREADABLE, "byte 28")),
    ],
)
def test_a_bad_dataset(
    trainer: Trainer, run_config: dict[str, Any], upload: Any, name: str, said: tuple[Reason, str]
) -> None:
    run_config["dataset"] = {"source": upload(name)}
    expect(trainer, run_config, said[0], 10, f"/bad/{name}", said[1])


def test_a_missing_key(trainer: Trainer, run_config: dict[str, Any]) -> None:
    run_config["dataset"] = {"source": "s3://trainer/data/other.csv"}
    expect(
        trainer,
        run_config,
        Reason.DATASET_NOT_FOUND,
        10,
        "s3://trainer/data/other.csv",
        "spec.dataset.source",
    )


@pytest.mark.parametrize("part", ["dataset", "model", "output"])
def test_a_missing_bucket(trainer: Trainer, run_config: dict[str, Any], part: str) -> None:
    key = "uri" if part == "output" else "source"
    run_config[part] = {key: "s3://nowhere/a/b"}
    expect(trainer, run_config, Reason.BUCKET_NOT_FOUND, 11, "'nowhere'", "s3://nowhere")


def test_no_credentials(trainer: Trainer, run_config: dict[str, Any]) -> None:
    trainer.environment = {}
    expect(trainer, run_config, Reason.STORAGE_ACCESS_DENIED, 11, "spec.storage.secretRef")


def test_a_store_that_is_not_there(trainer: Trainer, run_config: dict[str, Any]) -> None:
    run_config["storage"] = {"endpoint": "http://127.0.0.1:9"}
    expect(
        trainer, run_config, Reason.STORAGE_UNAVAILABLE, 1, "127.0.0.1:9", "spec.storage.endpoint"
    )


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A store that checks keys."""
    with object_store(tmp_path_factory.mktemp("seaweedfs")) as store:
        store.create_bucket("private")
        store.client().put_object(Bucket="private", Key="train.csv", Body=b"instruction,response\n")
        yield store


@pytest.mark.parametrize("wrong", ["key", "secret"])
def test_refused_credentials(
    trainer: Trainer, run_config: dict[str, Any], seaweed: ObjectStore, wrong: str
) -> None:
    secret = "never-to-be-shown" if wrong == "secret" else seaweed.secret_key
    trainer.environment = {
        "AWS_ACCESS_KEY_ID": "unknown" if wrong == "key" else seaweed.access_key,
        "AWS_SECRET_ACCESS_KEY": secret,
    }
    run_config["dataset"] = {"source": "s3://private/train.csv"}
    run_config["storage"] = {"endpoint": seaweed.endpoint}
    expect(
        trainer,
        run_config,
        Reason.STORAGE_ACCESS_DENIED,
        11,
        "s3://private/train.csv",
        "InvalidAccessKeyId" if wrong == "key" else "SignatureDoesNotMatch",
        "spec.storage.secretRef",
    )
    assert secret not in trainer("prepare", run_config).output


@pytest.fixture(scope="module")
def hub(tiny_model: Path) -> Iterator[str]:
    with hub_server(tiny_model) as address:
        yield address


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"source": "public/none"}, (Reason.MODEL_NOT_FOUND, 11, "spec.model.source")),
        (
            {"source": "public/tiny", "revision": "v9"},
            (Reason.MODEL_NOT_FOUND, 11, "no revision 'v9'"),
        ),
        ({"source": "gated/tiny"}, (Reason.MODEL_ACCESS_DENIED, 11, "accept its licence")),
        ({"source": "broken/tiny"}, (Reason.MODEL_HUB_UNAVAILABLE, 1, "HTTP 503")),
    ],
)
def test_a_hub_model_that_can_not_be_had(
    trainer: Trainer,
    run_config: dict[str, Any],
    hub: str,
    model: dict[str, str],
    said: tuple[Reason, int, str],
) -> None:
    trainer.environment["HF_ENDPOINT"] = hub
    run_config["model"] = model
    expect(trainer, run_config, said[0], said[1], model["source"], said[2])


def test_no_hub(trainer: Trainer, run_config: dict[str, Any]) -> None:
    trainer.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    run_config["model"] = {"source": "public/tiny"}
    expect(trainer, run_config, Reason.MODEL_HUB_UNAVAILABLE, 1, "public/tiny", "HF_ENDPOINT")


def test_a_public_hub_model_is_pinned_to_its_commit(
    trainer: Trainer, run_config: dict[str, Any], hub: str
) -> None:
    trainer.environment["HF_ENDPOINT"] = hub
    run_config["model"] = {"source": "public/tiny"}
    run_config["training"]["epochs"] = 1
    run_config["export"] = {"merged": True, "gguf": []}
    run = trainer("run", run_config)
    assert run.code == 0, run.output
    assert run.result is not None
    again = trainer("prepare", run_config)
    assert again.result is not None
    assert again.result.resolved is not None
    assert again.result.resolved.model_revision == COMMIT
    assert len(again.result.complete) == 3


@pytest.fixture
def damaged(run_config: dict[str, Any], tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model for a test to damage; the run's base model."""
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_model, folder)
    run_config["model"] = {"source": str(folder)}
    return folder


@pytest.mark.parametrize(
    ("removed", "part"),
    [
        ("model.safetensors", "no safetensors"),
        ("config.json", "no config.json"),
        ("tokenizer.json", "tokenizer can't be loaded"),
    ],
)
def test_a_folder_that_is_no_whole_model(
    trainer: Trainer, run_config: dict[str, Any], damaged: Path, removed: str, part: str
) -> None:
    (damaged / removed).unlink()
    expect(trainer, run_config, Reason.MODEL_UNSUPPORTED, 11, part)


def test_a_model_that_llama_cpp_does_not_know(
    trainer: Trainer, run_config: dict[str, Any], damaged: Path
) -> None:
    config = json.loads((damaged / "config.json").read_text())
    config["architectures"] = ["UnheardOfForCausalLM"]
    (damaged / "config.json").write_text(json.dumps(config))
    said = ("UnheardOfForCausalLM", "spec.export.gguf")
    expect(trainer, run_config, Reason.MODEL_UNSUPPORTED, 11, *said)


def test_a_chat_template_without_an_end(
    trainer: Trainer, run_config: dict[str, Any], damaged: Path
) -> None:
    template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    (damaged / "chat_template.jinja").write_text(template)
    expect(trainer, run_config, Reason.MODEL_UNSUPPORTED, 11, "no special token", "eos_token")


def test_a_wrong_field(trainer: Trainer, run_config: dict[str, Any]) -> None:
    run_config["training"]["learningRate"] = "fast"
    expect(
        trainer, run_config, Reason.INVALID_CONFIG, 11, "spec.training.learningRate", "got 'fast'"
    )


def test_no_run_json(trainer: Trainer, run_config: dict[str, Any]) -> None:
    command = trainer.command("prepare", run_config)
    run_file = trainer.folder / "run.json"
    run_file.unlink()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 11
    assert f"{run_file} can't be read" in trainer.log.read_text()
