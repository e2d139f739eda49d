"""A file over its limit, from the stage's exit code to what a later `prepare` makes of it."""

from __future__ import annotations

import json
from typing import Any

from finetune_trainer.contract import Quality, Reason, Stage, StageResult
from hack.object_store import Credentials
from tests.integration.trainer.conftest import Run, Trainer

GOOD, BAD = "gguf/tiny-F16.gguf", "tiny-Q8_0.gguf"
NO_FILE_KEEPS = 1e-9  # nats per token


def figures(result: StageResult | None) -> dict[str, Quality | None]:
    """Quality of each GGUF file of a model, by path."""
    assert result is not None
    paths = {each.path: each.quality for each in result.artifacts}
    return {path: paths[path] for path in paths if path.endswith(".gguf") and "LoRA" not in path}


def ended(run: Run, code: int) -> StageResult:
    assert run.code == code, run.output
    assert run.result is not None
    return run.result


def test_a_refused_file_is_published_apart_and_the_export_is_not_complete(
    trainer: Trainer, run_config: dict[str, Any], moto: Credentials
) -> None:
    limits = [{"quantization": "Q8_0", "maxKLDivergence": NO_FILE_KEEPS}]
    export = {"merged": False, "gguf": ["F16", "Q8_0"], "qualityLimits": limits}
    result = ended(trainer("run", {**run_config, "export": export}), code=15)
    assert result.reason is Reason.QUALITY_GATE_FAILED
    for word in (BAD, "1e-09", "spec.export.qualityLimits", "rejected/"):
        assert word in result.message
    assert result.version is not None
    uri = f"{run_config['output']['uri']}/versions/{result.version}"
    assert result.manifest_uri == f"{uri}/manifest.json"
    assert uri in result.message
    refused = figures(result)
    assert refused.keys() == {GOOD, f"rejected/{BAD}"}
    good, bad = refused[GOOD], refused[f"rejected/{BAD}"]
    assert good is not None
    assert good.passed
    assert bad is not None
    assert (bad.passed, bad.over_limit, bad.max_kl_divergence) == (False, True, NO_FILE_KEEPS)

    held, manifest, _ = in_bucket(moto, uri)
    assert {GOOD, f"rejected/{BAD}"} <= held
    assert f"gguf/{BAD}" not in held
    assert {each["path"] for each in manifest["files"]} >= {GOOD, f"rejected/{BAD}"}

    again = ended(trainer("prepare", {**run_config, "export": export}), code=0)
    assert again.complete == (Stage.PREPARE, Stage.TRAIN)
    resolved = again.resolved and again.resolved.model_dump(mode="json")
    remembered = trainer("export", {**run_config, "export": export, "resolved": resolved})
    refusal = ended(remembered, code=15)
    assert refusal == result
    assert "llama.cpp" not in remembered.output, "nothing is computed again"
    assert in_bucket(moto, uri)[0] == held

    export["verify"] = "warn"
    warned = trainer("run", {**run_config, "export": export})
    result = ended(warned, code=0)
    assert "Training examples" not in warned.output
    assert f"{BAD}: " in result.message
    passed = {path: quality and quality.passed for path, quality in figures(result).items()}
    assert passed == {GOOD: True, f"gguf/{BAD}": False}
    assert result.version is not None
    assert result.version not in uri
    uri = f"{run_config['output']['uri']}/versions/{result.version}"
    held, manifest, modelfile = in_bucket(moto, uri)
    assert current(moto, run_config["output"]["uri"]) == manifest
    assert not any(path.startswith("rejected/") for path in held)
    assert f"\nFROM ./{GOOD}\n" in modelfile, "though a small model had better be served as Q8_0"

    cached = ended(trainer("prepare", {**run_config, "export": export}), code=0)
    assert cached.complete == (Stage.PREPARE, Stage.TRAIN, Stage.EXPORT)
    assert figures(cached) == figures(result)
    assert (cached.version, cached.manifest_uri) == (result.version, result.manifest_uri)
    goes_back_to(refusal, trainer, {**run_config, "export": {**export, "verify": "fail"}})
    assert current(moto, run_config["output"]["uri"]) == manifest


def goes_back_to(refusal: StageResult, trainer: Trainer, config: dict[str, Any]) -> None:
    """What was refused is still known, and the good version stays current."""
    back = ended(trainer("run", config), code=15)
    assert (back.version, back.artifacts) == (refusal.version, refusal.artifacts)
    assert "goes on naming version " in back.message


def current(moto: Credentials, uri: str) -> dict[str, Any]:
    """The manifest.json of the output folder."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    body = moto.client().get_object(Bucket=bucket, Key=f"{prefix}/manifest.json")["Body"]
    return dict(json.loads(body.read()))


def in_bucket(moto: Credentials, uri: str) -> tuple[set[str], dict[str, Any], str]:
    """The paths below a version's folder, its manifest, and its Modelfile."""
    client = moto.client()
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    listed = client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")["Contents"]

    def read(name: str) -> bytes:
        return client.get_object(Bucket=bucket, Key=f"{prefix}/{name}")["Body"].read()

    paths = {item["Key"].removeprefix(f"{prefix}/") for item in listed}
    return paths, json.loads(read("manifest.json")), read("Modelfile").decode()
