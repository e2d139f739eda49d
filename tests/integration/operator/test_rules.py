"""What the definition's rules and schema refuse, evaluated by the API server itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_operator.api.crd import custom_resource_definition
from hack import REPOSITORY
from hack.cluster.control_plane import ControlPlane
from hack.process import CommandFailed
from tests.integration.operator.stage import Namespace

EXAMPLES = REPOSITORY / "examples"
SECRET = {"secretKeyRef": {"name": "wandb", "key": "key"}}
COST_FACTOR = 4  # so much more could all rules cost, before a server refuses the definition

# For each rule, by its message, a value that it refuses.
REFUSED: dict[str, Any] = {
    "must be org/name on the Hugging Face Hub, s3://bucket/folder, or the absolute path of a "
    "mounted folder": "llama",
    "must be org/name on the Hugging Face Hub, s3://bucket/folder, oci://registry/repository:tag, "
    "or the absolute path of a mounted folder": "docker://registry/model:1",
    "must have exactly one of resourceClaimName and resourceClaimTemplateName": {"name": "gpu"},
    "must have exactly one of configMapRef and secretRef": {},
    "must have exactly one of claimName, configMap, secret, image": {"mountPath": "/models"},
    "must have sizeLimit, or storage, and storageClassName with storage alone": {
        "storageClassName": "fast"
    },
    "must start with http:// or https://": "minio:9000",
    "must have no user or password in it: keys belong in the Secret of secretRef": "https://a:b@c",
    "must have kmsKeyId only with algorithm aws:kms": {"algorithm": "AES256", "kmsKeyId": "key"},
    "must be an s3://bucket/key URI, hf://datasets/org/name or the absolute path of a mounted "
    "file": "gs://data/faq.csv",
    "must have three different characters for delimiter, quote and escape": {"delimiter": '"'},
    "must name no other column beside text, which is learnt as it is": {
        "text": "body",
        "instruction": "ask",
    },
    "must be a whole number from 0, or a percentage such as 10%": "101%",
    "must be a whole number from 1 to 1000, or auto": 1001,
    "must be all-linear alone, or names of layers without it": ["all-linear", "q_proj"],
    "must have dropout 0 and no useDora with targetParameters, as PEFT wants it": {
        "targetParameters": ["mlp.experts.down_proj"],
        "dropout": 0.05,
    },
    "must be onEdit, or an interval of 1m or more, such as 30m, 6h or 1h30m": "1s",
    "must be a version's name, 12 characters as in status.versions": "latest",
    "must be a duration of 1s or more, such as 30m or 1h30m": "0s",
    "must be an s3://bucket/key URI or the absolute path of a mounted folder": "out",
    "must be org/name of a repository on the Hugging Face Hub": "tuned",
    "must be a registry's host and a path without a tag, such as registry.example.com/team/model": (
        "registry.example.com/team/model:v1"
    ),
    "must consist of letters, digits, '.', '_' and '-'": "v1/stable",
    "must have importanceMatrix: true with the types IQ2 and IQ3 in gguf": {"gguf": ["IQ3_M"]},
    "must be namespace/name of the FineTuneJob that the folder belongs to": "support",
    "must have exactly one of value and valueFrom": {"name": "WANDB_API_KEY"},
    "must leave out lora and initFrom with method full, which trains no adapter": {
        "method": "full",
        "lora": {"r": 8},
    },
    "must have objective sft with method full and with initFrom: preferences are learnt against "
    "the base, with the adapter off. To go on from a version, name its merged model in "
    "spec.model.source": {"objective": "dpo", "method": "full"},
}


def rules(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Path and message of each rule of a schema; [] stands for the items of a list."""
    for rule in node.get("x-kubernetes-validations", ()):
        yield path, rule["message"]
    for name, inner in node.get("properties", {}).items():
        yield from rules(inner, f"{path}.{name}" if path else name)
    if "items" in node:
        yield from rules(node["items"], f"{path}[]")
    values = node.get("additionalProperties")
    if isinstance(values, dict):
        yield from rules(values, f"{path}{{}}")


def schema(definition: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


RULES = sorted(rules(schema(custom_resource_definition())))


@pytest.fixture(scope="module")
def default(supported: ControlPlane) -> Iterator[Namespace]:
    """A namespace in which nothing is created."""
    namespace = Namespace(supported, "default")
    yield namespace
    namespace.close()


def spec_with(path: str, value: object) -> dict[str, Any]:
    """The parts of a spec that this file changes, with a value for one field."""
    spec: dict[str, Any] = {
        "model": {"source": "org/base"},
        "dataset": {"source": "s3://data/faq.csv"},
        "output": {"uri": "s3://models/support"},
    }
    *parts, name = path.split(".")
    inner = spec
    for part in parts:
        inner = inner.setdefault(part, {})
        if part == "hub":
            inner["tokenSecretRef"] = {"name": "hub"}
        if part == "oci":
            inner["repository"] = "registry.example.com/model"
    inner[name.removesuffix("[]")] = [value] if name.endswith("[]") else value
    return spec


def test_every_example_is_accepted(default: Namespace) -> None:
    files = [*EXAMPLES.glob("*.yaml"), *EXAMPLES.glob("gallery/*.yaml")]
    named = [f"--filename={file}" for file in files]
    said = default.plane.kubectl("apply", "--dry-run=server", "--validate=strict", *named)
    assert said.count("finetunejob.finetune.dev/") == len(files)


def test_the_server_has_all_rules(default: Namespace) -> None:
    name = "crd/finetunejobs.finetune.dev"
    installed = json.loads(default.plane.kubectl("get", name, "-o", "json"))
    assert sorted(rules(schema(installed))) == RULES


@pytest.mark.parametrize(("path", "message"), RULES)
def test_each_rule_refuses_in_its_own_words(default: Namespace, path: str, message: str) -> None:
    said = default.refusal(**spec_with(path.removeprefix("spec."), REFUSED[message]))
    assert f"{path.replace('[]', '[0]')}: Invalid value: " in said
    assert message in said


def test_no_rule_is_near_the_servers_limit_of_cost(default: Namespace) -> None:
    """The server estimates each rule by the longest value and the longest list that it may meet."""
    assert priced(default.plane, COST_FACTOR) == ""
    assert "exceeds budget" in priced(default.plane, 1000)  # what a rule too many looks like


def priced(plane: ControlPlane, factor: int) -> str:
    """What the server says to a definition whose rules may be met so many times as often."""
    definition = custom_resource_definition()
    fields = schema(definition)["properties"]
    inner = {name: field for name, field in fields["spec"].items() if name != "default"}
    fields["spec"] = {
        "type": "object",
        "properties": {"each": {"type": "array", "maxItems": factor, "items": inner}},
    }
    definition["metadata"]["name"] = "pricedjobs.finetune.dev"
    names = {"kind": "PricedJob", "listKind": "PricedJobList"}
    definition["spec"]["names"] = {"plural": "pricedjobs", "singular": "pricedjob", **names}
    try:
        plane.kubectl("create", "--dry-run=server", "-f", "-", input=json.dumps(definition))
    except CommandFailed as error:
        return str(error)
    return ""


def test_the_largest_spec_stays_below_what_rules_may_cost_at_run_time(default: Namespace) -> None:
    variables = [{"name": f"V{n}", "value": "x" * 200} for n in range(128)]
    stages = {stage: {"env": variables} for stage in ("prepare", "train", "export")}
    long = "a" * 500
    store = {"endpoint": f"https://{long}"}
    assert (
        default.refusal(
            model={"source": f"s3://{long}", "storage": store},
            dataset={"source": f"s3://{long}", "evalSource": f"s3://{long}", "storage": store},
            output={"uri": f"s3://{long}"},
            storage=store,
            stages=stages,
        )
        == ""
    )


@pytest.mark.parametrize(
    ("path", "value", "refusal"),
    [
        ("dataset.maxInvalidRows", True, "must be of type integer,string"),
        ("training.epochs", 1.5, "must be of type integer,string"),
        ("stages.train.resources.limits", {"cpu": False}, "must be of type integer,string"),
        ("training.lora.targetModules", ["q_proj", "q_proj"], "Duplicate value"),
        ("training.lora.targetModules", ["q-proj"], "should match '^(all-linear|"),
        ("training.reportTo", ["wandb", "wandb"], "Duplicate value"),
        ("export.gguf", ["F16", "F16"], "Duplicate value"),
        (
            "export.qualityLimits",
            [{"quantization": "Q8_0", "maxKLDivergence": n} for n in (1, 2)],
            "Duplicate value",
        ),
        ("export.qualityLimits", [{"maxKLDivergence": 1}], "quantization: Required value"),
    ],
)
def test_types_sets_and_keys_of_lists_are_checked(
    default: Namespace, path: str, value: object, refusal: str
) -> None:
    said = default.refusal(**spec_with(path, value))
    assert f"spec.{path}" in said
    assert refusal in said


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
        ("training", {"method": "full"}, ""),
        ("training", {"method": "full", "lora": {}}, ""),
        (
            "training",
            {"method": "full", "lora": {"dropout": 0}},
            "must leave out lora and",
        ),
        ("training", {"method": "qlora", "lora": {"dropout": 0}}, ""),
        (
            "training",
            {"method": "full", "initFrom": {"source": "s3://models/adapter"}},
            "must leave out lora and",
        ),
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
        ("export", {"gguf": ["IQ2_XXS"], "importanceMatrix": True}, ""),
        ("export", {"gguf": ["Q8_0", "IQ4_XS"]}, ""),
        ("output.hub.repo", "org/tuned", ""),
        ("output.oci", {"repository": "localhost:5000/model"}, ""),
        ("output.oci", {"repository": "registry.example.com/a/b-c", "include": ["Q4_K_M"]}, ""),
        ("output.oci.repository", "registry.example.com", "must be a registry's host"),
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
