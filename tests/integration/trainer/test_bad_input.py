"""Bad input, by the command line: each ends soon, with its reason, exit code and a remedy."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from finetune_trainer.contract import Reason, StageResult
from hack.object_store import Credentials, ObjectStore
from tests.integration.trainer.conftest import Trainer
from tests.integration.trainer.hub_server import COMMIT, hub_server

HEADER = b"instruction,response\n"
BAD = b"Who is it?,\n"  # a row without a response
GOOD = b"What is it?,A kettle.\n"


def expect(
    trainer: Trainer, config: dict[str, Any], reason: Reason, code: int, *parts: str
) -> StageResult:
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
    return run.result


@pytest.fixture
def upload(moto: Credentials, bucket: str) -> Any:
    def _upload(name: str, content: bytes) -> str:
        moto.client().put_object(Bucket=bucket, Key=f"bad/{name}", Body=content)
        return f"s3://{bucket}/bad/{name}"

    return _upload


def half_a_parquet_file() -> bytes:
    stream = io.BytesIO()
    columns = {"instruction": ["What is it?"] * 99, "response": ["A kettle."] * 99}
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()[:-20]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.csv", b"", (Reason.DATASET_EMPTY, "is empty")),
        ("header-only.csv", HEADER, (Reason.DATASET_EMPTY, "no rows")),
        (
            "other-header.csv",
            b"Instruction,Answer\nWho?,Me\n",
            (Reason.COLUMN_NOT_FOUND, "no column 'response'; it has 'Instruction', 'Answer'"),
        ),
        (
            "blank-cells.csv",
            HEADER + BAD + GOOD,
            (Reason.INVALID_ROWS, "row 2: 'response' is blank"),
        ),
        ("document.csv", b"%PDF-1.7\n1 0 obj", (Reason.DATASET_UNREADABLE, "a PDF document")),
        ("half.parquet", half_a_parquet_file(), (Reason.DATASET_UNREADABLE, "Parquet")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_dataset(
    trainer: Trainer,
    run_config: dict[str, Any],
    upload: Any,
    *,
    name: str,
    content: bytes,
    said: tuple[Reason, str],
) -> None:
    run_config["dataset"] = {"source": upload(name, content)}
    expect(trainer, run_config, said[0], 10, f"/bad/{name}", said[1])


def test_bad_rows_are_skipped_up_to_the_limit(
    trainer: Trainer, run_config: dict[str, Any], upload: Any, moto: Credentials
) -> None:
    """Twelve bad rows: ten are in the result, all are in the report, and the limit holds."""
    source = upload("twelve.csv", HEADER + 12 * (GOOD + BAD))
    run_config["export"] = {"gguf": []}
    run_config["dataset"] = {
        "source": source,
        "onInvalidRow": "skip",
        "maxInvalidRows": 12,
        "evalFraction": 0,
    }
    run = trainer("prepare", run_config)
    assert run.code == 0, run.output
    assert run.result is not None
    found = run.result.dataset
    assert found is not None
    assert (found.rows, found.examples, found.invalid, found.duplicates) == (24, 12, 12, 11)
    assert [bad.row for bad in found.first_invalid] == list(range(3, 23, 2))
    assert "12 bad rows skipped" in run.result.message
    report = read_report(moto, run_config)
    assert [bad["row"] for bad in report["invalidRows"]] == list(range(3, 26, 2))
    assert {bad["cause"] for bad in report["invalidRows"]} == {"'response' is blank"}

    run_config["dataset"]["maxInvalidRows"] = 11
    said = ("12 bad rows", "row 3: ", "and 2 more", "spec.dataset.maxInvalidRows", "lists all")
    failed = expect(trainer, run_config, Reason.INVALID_ROWS, 10, source, *said)
    assert failed.dataset is not None
    assert (failed.dataset.rows, failed.dataset.invalid) == (24, 12)
    uri = next(word for word in failed.message.split() if word.endswith("dataset-report.json"))
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    report = json.loads(moto.client().get_object(Bucket=bucket, Key=key)["Body"].read())
    assert len(report["invalidRows"]) == 12


def read_report(moto: Credentials, config: dict[str, Any]) -> Any:
    """The report of the only run in the output folder."""
    bucket, _, prefix = config["output"]["uri"].removeprefix("s3://").partition("/")
    listed = moto.client().list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/stages/prepare")
    (key,) = (o["Key"] for o in listed["Contents"] if o["Key"].endswith("report.json"))
    return json.loads(moto.client().get_object(Bucket=bucket, Key=key)["Body"].read())


def test_too_many_rows_are_too_long(
    trainer: Trainer, run_config: dict[str, Any], upload: Any, moto: Credentials
) -> None:
    """Of 20 rows, 10% may be cut: two are, and one is left out since its question is too long."""
    long = [b"Say a lot.," + b"word " * 200 + b"\n"] * 2 + [b"why " * 300 + b",Because.\n"]
    source = upload("long.csv", HEADER + GOOD * 17 + b"".join(long))
    run_config["dataset"] = {"source": source}
    run_config["training"]["maxSequenceLength"] = 128
    said = (
        "3 of the 20 rows of",
        "(128 tokens), 1 of them so that no answer would be left",
        "spec.dataset.maxTruncatedRows (10%) allows 2",
        "19 (",
        "Set maxSequenceLength to ",
        "lists all",
    )
    failed = expect(trainer, run_config, Reason.EXAMPLES_TOO_LONG, 10, source, *said)
    report = read_report(moto, run_config)
    assert report["truncated"] == {"count": 2, "rows": [19, 20]}
    assert report["leftOut"] == {"count": 1, "rows": [21]}
    assert failed.dataset is not None
    assert (failed.dataset.rows, failed.dataset.truncated) == (20, 3)


def test_a_missing_key(trainer: Trainer, run_config: dict[str, Any]) -> None:
    run_config["dataset"] = {"source": "s3://trainer-bucket/data/other.csv"}
    expect(
        trainer,
        run_config,
        Reason.DATASET_NOT_FOUND,
        10,
        "s3://trainer-bucket/data/other.csv",
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
def private(seaweed: ObjectStore) -> ObjectStore:
    """A store that checks keys, with a dataset."""
    seaweed.create_bucket("private")
    seaweed.client().put_object(Bucket="private", Key="train.csv", Body=b"instruction,response\n")
    return seaweed


@pytest.mark.parametrize("wrong", ["key", "secret"])
def test_refused_credentials(
    trainer: Trainer, run_config: dict[str, Any], private: ObjectStore, wrong: str
) -> None:
    secret = "never-to-be-shown" if wrong == "secret" else private.secret_key
    trainer.environment = {
        "AWS_ACCESS_KEY_ID": "unknown" if wrong == "key" else private.access_key,
        "AWS_SECRET_ACCESS_KEY": secret,
    }
    run_config["dataset"] = {"source": "s3://private/train.csv"}
    run_config["output"] = {"uri": "s3://private/tuned"}
    run_config["storage"] = {"endpoint": private.endpoint}
    expect(
        trainer,
        run_config,
        Reason.STORAGE_ACCESS_DENIED,
        11,
        "s3://private/tuned/owner.json",
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
    assert again.result.resolved.model_commit == COMMIT
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


def test_a_chat_template_that_loops(
    trainer: Trainer, run_config: dict[str, Any], damaged: Path
) -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (damaged / "chat_template.jinja").write_text(loop)
    said = ("chat template computes for more than 5 seconds", "chat_template.jinja")
    expect(trainer, run_config, Reason.MODEL_UNSUPPORTED, 11, *said)


def test_a_chat_template_without_system_prompts(
    trainer: Trainer, run_config: dict[str, Any], damaged: Path
) -> None:
    template = (damaged / "chat_template.jinja").read_text()
    refusal = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system!') }}{% endif %}"
    )
    (damaged / "chat_template.jinja").write_text(refusal + template)
    run_config["dataset"]["systemPrompt"] = "You are a kettle."
    said = ("takes no system prompt (No system!)", "spec.dataset.systemPrompt")
    expect(trainer, run_config, Reason.INVALID_CONFIG, 11, *said)
    ignoring = (
        "{% set messages = messages | rejectattr('role', 'eq', 'system') | list %}" + template
    )
    (damaged / "chat_template.jinja").write_text(ignoring)
    expect(trainer, run_config, Reason.INVALID_CONFIG, 11, "leaves system prompts out")


def test_held_out_rows_that_are_the_dataset_itself(
    trainer: Trainer, run_config: dict[str, Any]
) -> None:
    run_config["dataset"]["evalSource"] = run_config["dataset"]["source"]
    expect(trainer, run_config, Reason.INVALID_CONFIG, 11, "spec.dataset.evalSource")


def test_held_out_rows_that_are_not_there(trainer: Trainer, run_config: dict[str, Any]) -> None:
    run_config["dataset"]["evalSource"] = "s3://trainer-bucket/data/none.csv"
    said = ("s3://trainer-bucket/data/none.csv", "correct spec.dataset.evalSource")
    expect(trainer, run_config, Reason.DATASET_NOT_FOUND, 10, *said)


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
