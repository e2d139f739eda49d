"""What the definition's rules and schema refuse, evaluated by the API server itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from hack.cluster.control_plane import ControlPlane
from tests.integration.operator.stage import Namespace

SECRET = {"secretKeyRef": {"name": "wandb", "key": "key"}}


@pytest.fixture(scope="module")
def default(supported: ControlPlane) -> Iterator[Namespace]:
    """A namespace in which nothing is created."""
    namespace = Namespace(supported, "default")
    yield namespace
    namespace.close()


def spec_with(path: str, value: object) -> dict[str, Any]:
    """The parts of a spec that this file changes, with a value for one field."""
    spec: dict[str, Any] = {
        "dataset": {"source": "s3://data/faq.csv"},
        "output": {"uri": "s3://models/support"},
    }
    *parts, name = path.split(".")
    inner = spec
    for part in parts:
        inner = inner.setdefault(part, {})
        if part == "hub":
            inner["tokenSecretRef"] = {"name": "hub"}
    inner[name] = value
    return spec


@pytest.mark.parametrize(
    ("path", "value", "refusal"),
    [
        ("model.source", "meta-llama/Llama-3.2-1B", ""),
        ("model.source", "s3://models/llama", ""),
        ("model.source", "/mnt/models/llama", ""),
        ("model.source", "llama", "must be org/name"),
        ("model.source", "https://example.org/llama", "must be org/name"),
        ("dataset.source", "s3://data/faq.csv", ""),
        ("dataset.source", "hf://datasets/org/name@main/data/train-*.parquet", ""),
        ("dataset.source", "/mnt/data/*.csv", ""),
        ("dataset.source", "faq.csv", "must be an s3://bucket/key URI"),
        ("dataset.source", "hf://org/name", "must be an s3://bucket/key URI"),
        ("dataset.evalSource", "hf://datasets/org/name", ""),
        ("dataset.encoding", "windows-1252", ""),
        ("dataset.encoding", "../latin", "should match"),
        ("dataset.csv", {"delimiter": "\t", "quote": "", "escape": "\\"}, ""),
        ("dataset.csv.delimiter", "\u00a7", ""),
        ("dataset.csv.delimiter", "\n", "should match"),
        ("dataset.csv", {"delimiter": '"'}, "must have three different characters"),
        ("dataset.csv", {"quote": "'", "escape": "'"}, "must have three different characters"),
        ("dataset.refresh", "onEdit", ""),
        ("dataset.refresh", "1m", ""),
        ("dataset.refresh", "1h30m", ""),
        ("dataset.refresh", "59s", "must be onEdit, or an interval of 1m or more"),
        ("dataset.refresh", "1d", "must be onEdit, or an interval of 1m or more"),
        ("dataset.refresh", "hourly", "must be onEdit, or an interval of 1m or more"),
        ("dataset.refresh", "ms", "must be onEdit, or an interval of 1m or more"),
        ("dataset.maxInvalidRows", 0, ""),
        ("dataset.maxInvalidRows", "10%", ""),
        ("dataset.maxInvalidRows", -1, "must be a whole number from 0"),
        ("dataset.maxInvalidRows", "many", "must be a whole number from 0"),
        ("output.uri", "/mnt/out", ""),
        ("output.uri", "hf://datasets/org/name", "must be an s3://bucket/key URI"),
        ("output.uri", "gs://bucket/out", "must be an s3://bucket/key URI"),
        ("output.keepVersions", 1, ""),
        ("output.keepVersions", 0, "should be greater than or equal to 1"),
        ("output.takeOverFrom", "team-a/support", ""),
        ("output.takeOverFrom", "support", "must be namespace/name of the FineTuneJob"),
        ("output.hub.repo", "org/tuned", ""),
        ("output.hub.repo", "tuned", "must be org/name"),
        ("output.hub.repo", "https://huggingface.co/org/tuned", "must be org/name"),
        ("rollbackTo", "0123456789ab", ""),
        ("rollbackTo", "latest", "must be a version's name, 12 characters"),
        ("rollbackTo", "../../etc/ab", "must be a version's name, 12 characters"),
        ("storage.endpoint", "http://10.0.0.1:8333", ""),
        ("storage.endpoint", "minio:9000", "must start with http:// or https://"),
        ("storage.endpoint", "https://store.example/a@b", ""),
        ("storage.endpoint", "https://me:pass@store", "must have no user or password in it"),
        ("storage.endpoint", "http://token@store:9000/", "must have no user or password in it"),
        ("dataset.storage.endpoint", "https://me:pass@store", "must have no user or password"),
        ("storage.caBundle", {"configMapRef": {"name": "company-ca"}}, ""),
        ("storage.caBundle", {}, "must have exactly one of configMapRef and secretRef"),
        (
            "dataset.storage.caBundle",
            {"configMapRef": {"name": "a"}, "secretRef": {"name": "b"}},
            "must have exactly one of configMapRef and secretRef",
        ),
        ("storage.encryption", {"algorithm": "AES256"}, ""),
        ("storage.encryption", {"algorithm": "aws:kms", "kmsKeyId": "alias/models"}, ""),
        (
            "storage.encryption",
            {"algorithm": "AES256", "kmsKeyId": "alias/models"},
            "must have kmsKeyId only with algorithm aws:kms",
        ),
        ("training.epochs", 3, ""),
        ("training.epochs", "auto", ""),
        ("training.epochs", 0, "must be a whole number from 1 to 1000, or auto"),
        ("training.epochs", "many", "must be a whole number from 1 to 1000, or auto"),
    ],
)
def test_a_value_is_accepted_or_refused_in_the_rules_words(
    default: Namespace, path: str, value: object, refusal: str
) -> None:
    said = default.refusal(**spec_with(path, value))
    if refusal:
        assert f"spec.{path}: Invalid value: " in said
        assert refusal in said
    else:
        assert said == ""


@pytest.mark.parametrize(
    ("given", "refusal"),
    [
        ({"value": "x"}, ""),
        ({"value": ""}, ""),
        ({"valueFrom": SECRET}, ""),
        ({}, "must have exactly one of value and valueFrom"),
        ({"value": "x", "valueFrom": SECRET}, "must have exactly one of value and valueFrom"),
        ({"valueFrom": {}}, "valueFrom.secretKeyRef: Required value"),
        ({"valueFrom": {"secretKeyRef": {"name": "wandb"}}}, "secretKeyRef.key: Required value"),
        (
            {"valueFrom": {"configMapKeyRef": {"name": "wandb", "key": "key"}}},
            "valueFrom.secretKeyRef: Required value",
        ),
    ],
)
def test_a_variable_has_a_value_or_a_key_of_a_secret(
    default: Namespace, given: dict[str, Any], refusal: str
) -> None:
    said = default.refusal(stages={"train": {"env": [{"name": "WANDB_API_KEY", **given}]}})
    if refusal:
        assert "spec.stages.train.env[0]" in said
        assert refusal in said
    else:
        assert said == ""
