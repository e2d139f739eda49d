"""A file over its limit, from the stage's exit code to what a later `prepare` makes of it."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from typing import Any

import psutil

from finetune_trainer.contract import Quality, Reason, Stage, StageResult
from hack.object_store import Credentials
from tests.integration.trainer.conftest import Run, Trainer
from tests.integration.trainer.s3_proxy import Fault, Proxy, s3_proxy

GOOD, BAD = "gguf/tiny-F16.gguf", "tiny-Q8_0.gguf"
NO_FILE_KEEPS = 1e-9  # nats per token


def figures(result: StageResult | None) -> dict[str, Quality | None]:
    """Quality of each GGUF file of a model, by path."""
    assert result is not None
    paths = {each.path: each.quality for each in result.artifacts}
    return {path: paths[path] for path in paths if path.endswith(".gguf") and "LoRA" not in path}


def ended(run: Run, code: int, said: str = "") -> StageResult:
    assert run.code == code, run.output
    assert said in run.output
    assert run.result is not None
    return run.result


def test_a_refused_file_is_published_apart_and_the_export_is_not_complete(
    trainer: Trainer, run_config: dict[str, Any], moto: Credentials
) -> None:
    limits = [{"quantization": "Q8_0", "maxKLDivergence": NO_FILE_KEEPS}]
    export = {"merged": False, "gguf": ["F16", "Q8_0"], "qualityLimits": limits}
    result = ended(
        trainer("run", {**run_config, "export": export}), code=15, said="Asking tiny-F16.gguf and"
    )  # the smaller one failed
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

    warn = {**export, "verify": "warn", "gguf": ["F16", "Q8_0", "Q6_K", "Q4_K_M"]}
    warned = goes_on(trainer, {**run_config, "export": warn}, moto)
    result = ended(warned, code=0, said="Asking tiny-Q4_K_M.gguf and")  # the smallest
    assert "Training examples" not in warned.output
    assert figures(result)[GOOD] == good, "those of a file that was checked before the pod died"
    assert f"{BAD}: " in result.message
    passed = {path: quality and quality.passed for path, quality in figures(result).items()}
    others = {f"gguf/tiny-{kind}.gguf": True for kind in ("Q6_K", "Q4_K_M")}
    assert passed == {GOOD: True, f"gguf/{BAD}": False, **others}
    assert result.version is not None
    assert result.version not in uri
    uri = f"{run_config['output']['uri']}/versions/{result.version}"
    held, manifest, modelfile = in_bucket(moto, uri)
    assert current(moto, run_config["output"]["uri"]) == manifest
    assert not any(path.startswith("rejected/") for path in held)
    assert "\nFROM ./gguf/tiny-Q6_K.gguf\n" in modelfile, "Q8_0 would be better, but failed"

    cached = ended(trainer("prepare", {**run_config, "export": warn}), code=0)
    assert cached.complete == (Stage.PREPARE, Stage.TRAIN, Stage.EXPORT)
    assert figures(cached) == figures(result)
    assert (cached.version, cached.manifest_uri) == (result.version, result.manifest_uri)
    goes_back_to(refusal, trainer, {**run_config, "export": export})
    assert current(moto, run_config["output"]["uri"]) == manifest


def test_a_refused_merged_model_is_published_apart_where_there_is_no_other_file(
    trainer: Trainer, run_config: dict[str, Any], moto: Credentials
) -> None:
    limits = [{"quantization": "F16", "maxKLDivergence": NO_FILE_KEEPS}]
    export = {"merged": True, "gguf": [], "qualityLimits": limits}
    result = ended(trainer("run", {**run_config, "export": export}), code=15)
    assert result.reason is Reason.QUALITY_GATE_FAILED
    assert "merged" in result.message
    uri = f"{run_config['output']['uri']}/versions/{result.version}"
    client, (bucket, _, prefix) = moto.client(), uri.removeprefix("s3://").partition("/")
    listed = client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")["Contents"]
    paths = {item["Key"].removeprefix(f"{prefix}/") for item in listed}
    assert "rejected/merged/model.safetensors" in paths
    assert not any(path.startswith("merged/") for path in paths)
    weights = {each.path: each.quality for each in result.artifacts if each.quality}
    assert [*weights] == ["rejected/merged/model.safetensors"]
    assert not weights["rejected/merged/model.safetensors"].passed


def test_an_adapter_file_that_is_not_asked_for_only_lets_the_base_model_answer(
    trainer: Trainer, run_config: dict[str, Any], moto: Credentials
) -> None:
    export = {"merged": False, "gguf": ["F16"], "adapterGguf": False}
    run = trainer("run", {**run_config, "export": export})
    result = ended(run, code=0)
    assert not any("LoRA" in each.path for each in result.artifacts)
    held, manifest, _ = in_bucket(moto, f"{run_config['output']['uri']}/versions/{result.version}")
    assert not any("LoRA" in path for path in held)
    assert [each["file"] for each in manifest["gate"]["files"]] == ["tiny-F16.gguf"]
    assert "Checking tiny-LoRA" not in run.output
    assert all(sample["base"] for sample in manifest["gate"]["samples"])
    assert manifest["gate"]["samples"]


def goes_on(trainer: Trainer, config: dict[str, Any], moto: Credentials) -> Run:
    """An export whose pod dies when two of five files are checked and uploaded, and the third is
    about to be; what the next attempt says, which does only what is left."""
    resolved = ended(trainer("prepare", config), code=0).resolved
    assert resolved is not None
    last = f"gguf/{BAD}"
    with s3_proxy(moto.endpoint) as proxy:
        config = {
            **config,
            "storage": {"endpoint": proxy.endpoint},
            "resolved": resolved.model_dump(mode="json"),
        }
        dies_at(last, trainer, config, proxy)
        first = [each.path for each in proxy.requests if each.method == "PUT"]
        proxy.forget()
        proxy.choose = lambda _: None
        run = trainer("export", config)
        second = [each.path for each in proxy.requests if each.method == "PUT"]
    for name in ("tiny-F16.gguf", "tiny-LoRA-F32.gguf"):
        assert sum(path.endswith(name) for path in first) == 1
        assert not any(path.endswith(name) for path in second), "it is there"
        assert f"Checking {name}" not in run.output
    assert any(path.endswith(last) for path in second)
    for words in ("Asking the tuned model", "Merging the adapter", "Writing tiny-F16.gguf"):
        assert words not in run.output
    for kind in ("Q6_K", "Q4_K_M"):
        assert f"Checking tiny-{kind}.gguf" in run.output
    assert "gguf/tiny-F16.gguf was made and uploaded by an earlier attempt" in run.output
    return run


def dies_at(path: str, trainer: Trainer, config: dict[str, Any], proxy: Proxy) -> None:
    """Run an export until it uploads that file; then its whole pod is killed."""
    pod = list[psutil.Process]()

    def kill() -> None:
        children = pod[0].children(recursive=True)
        for process in (pod[0], *children):
            process.kill()
        process_ended.wait()

    process_ended = threading.Event()
    proxy.choose = lambda request: (
        Fault(wait=kill) if request.method == "PUT" and request.path.endswith(path) else None
    )
    with trainer.processes.popen(
        trainer.command("export", config),
        env=trainer.full_environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        pod.append(psutil.Process(process.pid))
        said, _ = process.communicate(timeout=300)
        process_ended.set()
    assert process.returncode == -signal.SIGKILL, said
    # Programs that it started may live a moment longer, and write there.
    (trainer.folder / "workspace").rename(trainer.folder / "workspace-of-the-dead")


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
