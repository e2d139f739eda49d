"""The children, compared with golden files and checked against Kubernetes' own schema.

`FINETUNE_WRITE_GOLDEN=1 pytest tests/unit/operator/test_manifests.py` writes the files anew.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic import ValidationError

from finetune_operator.api import ModelCache
from finetune_operator.api.finetunejob import FineTuneJobSpec
from finetune_operator.manifests import pod_settings_digest, stage_objects
from finetune_operator.observe import ObservedFineTuneJob
from finetune_operator.resources import training_hardware
from finetune_operator.settings import Settings
from finetune_trainer.contract import Hardware, JobReference, Needs, RunConfig, Stage, describe
from tests.unit.operator.build import EXPORT, PREPARE, SPEC, TRAIN, finetunejob, resolved

GOLDEN = Path(__file__).parent / "golden"
NEWEST = kubernetes_validate.latest_version()
SETTINGS = Settings(trainer_image="trainer:1")
FINGERPRINT = "f" * 64

EVERYTHING: dict[str, Any] = {
    **SPEC,
    "model": {"source": "org/base", "tokenSecretRef": {"name": "hub"}},
    "storage": {"endpoint": "http://store:8333", "secretRef": {"name": "bucket"}},
    "serviceAccountName": "workload-identity",
    "ttlSecondsAfterFinished": 0,
    "stages": {
        "train": {
            "image": "trainer:cuda",
            "resources": {
                "requests": {"cpu": 4, "memory": "16Gi"},
                "limits": {"nvidia.com/gpu": 2, "memory": "24Gi", "ephemeral-storage": "100Gi"},
            },
            "nodeSelector": {"gpu": "h100"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
            "priorityClassName": "batch",
            "runtimeClassName": "nvidia",
            "env": [
                {"name": "NCCL_DEBUG", "value": "INFO"},
                {"name": "HF_TOKEN", "value": "stands in the Secret"},
                {"name": "FINETUNE_JOB", "value": "mine"},
                {"name": "FINETUNE_LOG_FORMAT", "value": "human"},
                {
                    "name": "WANDB_API_KEY",
                    "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "api-key"}},
                },
                {
                    "name": "MLFLOW_TRACKING_TOKEN",
                    "valueFrom": {
                        "secretKeyRef": {"name": "mlflow", "key": "token", "optional": True}
                    },
                },
            ],
            "volumes": [
                {"claimName": "models", "mountPath": "/models", "readOnly": True},
                {"claimName": "scratch", "mountPath": "/scratch"},
                {"configMap": {"name": "settings"}, "mountPath": "/settings"},
                {"secret": {"secretName": "licence"}, "mountPath": "/licence"},
                {
                    "image": {"reference": "models.example/base:1", "pullPolicy": "IfNotPresent"},
                    "mountPath": "/base",
                },
            ],
            "workspace": {"storage": "200Gi", "storageClassName": "fast"},
            "labels": {"team": "ml", "finetune.dev/stage": "mine"},
            "annotations": {"note": "hello"},
        }
    },
}
PUBLISHING: dict[str, Any] = {
    **SPEC,
    "export": {"signing": {"keySecretRef": {"name": "signer"}}},
    "output": {
        **SPEC["output"],
        "hub": {"repo": "org/tuned", "tokenSecretRef": {"name": "pusher", "key": "write"}},
        "oci": {"repository": "images.example/tuned", "secretRef": {"name": "docker"}},
    },
}
STORES: dict[str, Any] = {
    **SPEC,
    "model": {
        "source": "s3://models/base",
        "storage": {"secretRef": {"name": "models"}, "region": "eu-central-1"},
    },
    "dataset": {
        **SPEC["dataset"],
        "storage": {
            "endpoint": "https://data.example",
            "secretRef": {"name": "data"},
            "caBundle": {"secretRef": {"name": "data-ca", "key": "root.pem"}},
        },
    },
    "storage": {
        "endpoint": "https://store.example",
        "pathStyle": True,
        "encryption": {"algorithm": "aws:kms", "kmsKeyId": "alias/models"},
        "secretRef": {"name": "bucket"},
        "caBundle": {"configMapRef": {"name": "company-ca"}},
    },
}
WITH_SECRETS = Settings(
    trainer_image="trainer:1",
    image_pull_policy="Never",
    image_pull_secrets=("registry",),
    trainer_log_format="json",
)
CLAIMS: dict[str, Any] = {
    **SPEC,
    "model": {"source": "oci://models.example/team/base:1"},
    "stages": {
        "train": {
            "resourceClaims": [
                {"name": "gpus", "resourceClaimTemplateName": "two-gpus", "gpus": 2},
                {"name": "network", "resourceClaimName": "infiniband", "gpus": 0},
            ]
        }
    },
}


def keeping(**place: Any) -> Settings:
    """Settings with a cache of models."""
    return Settings(trainer_image="trainer:1", model_cache=ModelCache.model_validate(place))


WITH_CACHE = keeping(persistentVolumeClaim={"claimName": "models"})
WITH_CACHE_IMAGE = keeping(image={"reference": "models.example/all:1"})
LONG_NAME = "a-very-long.name." + "x" * 200

CASES = {
    "prepare-minimal": (finetunejob(), SPEC, SETTINGS, PREPARE),
    "train-everything": (finetunejob(), EVERYTHING, WITH_SECRETS, TRAIN),
    "export-long-name": (finetunejob(name=LONG_NAME), SPEC, SETTINGS, EXPORT),
    "export-published": (finetunejob(), PUBLISHING, SETTINGS, EXPORT),
    "prepare-stores": (finetunejob(), STORES, SETTINGS, PREPARE),
    "train-claims-and-cache": (finetunejob(), CLAIMS, WITH_CACHE, TRAIN),
    "train-stores": (finetunejob(), STORES, SETTINGS, TRAIN),
}


class Readable(yaml.SafeDumper):
    """Writes texts of several lines as such."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Readable.add_representer(str, _text)


def objects(
    owner: ObservedFineTuneJob,
    spec: dict[str, Any],
    settings: Settings,
    stage: Stage,
    nodes: tuple[dict[str, str], ...] = (),
) -> list[dict[str, Any]]:
    parsed = FineTuneJobSpec.model_validate(spec)
    return list(
        stage_objects(
            owner,
            parsed,
            settings,
            stage=stage,
            stage_key="1" if stage is PREPARE else FINGERPRINT,
            attempt=1,
            resolved=None if stage is PREPARE else resolved(),
            hardware=training_hardware(parsed, nodes),
        )
    )


@pytest.mark.parametrize("name", CASES)
def test_objects_are_as_in_the_golden_file(name: str) -> None:
    made = objects(*CASES[name])
    path = GOLDEN / f"{name}.yaml"
    if os.environ.get("FINETUNE_WRITE_GOLDEN"):
        path.write_text(yaml.dump_all(made, Dumper=Readable, sort_keys=False), encoding="utf-8")
    assert made == list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", CASES)
def test_the_newest_kubernetes_knows_every_field(name: str) -> None:
    for made in objects(*CASES[name]):
        kubernetes_validate.validate(made, NEWEST, strict=True)


@pytest.mark.parametrize("name", CASES)
def test_names_and_labels_fit(name: str) -> None:
    for made in objects(*CASES[name]):
        meta = made["metadata"]
        assert len(meta["name"]) <= 63
        assert all(len(value) <= 63 for value in meta["labels"].values())


def test_the_job_comes_last_since_its_pod_needs_the_others() -> None:
    kinds = [made["kind"] for made in objects(*CASES["prepare-minimal"])]
    assert kinds == ["ServiceAccount", "Role", "RoleBinding", "ConfigMap", "Job"]


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize(
    ("settings", "source"),
    [
        (WITH_CACHE, {"persistentVolumeClaim": {"claimName": "models"}}),
        (WITH_CACHE_IMAGE, {"image": {"reference": "models.example/all:1"}}),
    ],
    ids=["claim", "image"],
)
def test_every_stage_mounts_the_cache_of_models(
    stage: Stage, settings: Settings, source: dict[str, Any]
) -> None:
    pod = pod_of(SPEC, stage, settings)
    (container,) = pod["containers"]
    assert {"name": "model-cache", **source} in pod["volumes"]
    (mount,) = [each for each in container["volumeMounts"] if each["name"] == "model-cache"]
    assert mount.get("readOnly", False) is ("image" in source)
    folder = {"name": "FINETUNE_MODEL_CACHE", "value": mount["mountPath"]}
    assert folder in container["env"]


def test_another_cache_makes_other_pods() -> None:
    parsed = FineTuneJobSpec.model_validate(SPEC)
    made = {
        pod_settings_digest(parsed, TRAIN, each)
        for each in (SETTINGS, WITH_CACHE, WITH_CACHE_IMAGE)
    }
    assert len(made) == 3


NEEDS = Needs(
    train_memory_bytes=3 << 30,
    train_storage_bytes=(5 << 30) + 1,
    export_memory_bytes=2 << 30,
    export_storage_bytes=7 << 30,
)


def requested(stage: Stage, needs: Needs | None = NEEDS, **more: Any) -> dict[str, Any]:
    """What the pod of a stage requests, with these settings."""
    own = more.pop("settings", {})
    parsed = FineTuneJobSpec.model_validate({**SPEC, "stages": {str(stage): own}, **more})
    found = resolved().model_copy(update={"needs": needs})
    job = stage_objects(
        finetunejob(),
        parsed,
        SETTINGS,
        stage=stage,
        stage_key="1",
        attempt=1,
        resolved=None if stage is PREPARE else found,
        hardware=Hardware(),
    ).job
    (container,) = job["spec"]["template"]["spec"]["containers"]
    requests: dict[str, Any] = container.get("resources", {}).get("requests", {})
    return requests


def test_pods_request_what_is_predicted() -> None:
    assert requested(PREPARE) == {"memory": "512Mi", "ephemeral-storage": "1024Mi"}
    assert requested(TRAIN) == {"memory": "3072Mi", "ephemeral-storage": "5121Mi"}
    assert requested(EXPORT) == {"memory": "2048Mi", "ephemeral-storage": "7168Mi"}
    assert requested(TRAIN, Needs(train_memory_bytes=1)) == {"memory": "1Mi"}
    assert requested(TRAIN, None) == {}


def test_what_the_spec_says_of_memory_and_disk_counts() -> None:
    limits = {"resources": {"limits": {"memory": "8Gi"}, "requests": {"cpu": 2}}}
    assert requested(TRAIN, settings=limits) == {"cpu": 2, "ephemeral-storage": "5121Mi"}
    volume = {"workspace": {"storage": "200Gi"}}
    assert requested(EXPORT, settings=volume) == {"memory": "2048Mi"}


def test_a_queue_counts_what_the_spec_requests_alone() -> None:
    assert requested(TRAIN, queueName="team") == {}


def test_a_prediction_changes_no_jobs_name() -> None:
    names = {
        stage_objects(
            finetunejob(),
            FineTuneJobSpec.model_validate(SPEC),
            SETTINGS,
            stage=TRAIN,
            stage_key="1",
            attempt=1,
            resolved=resolved().model_copy(update={"needs": needs}),
            hardware=Hardware(),
        ).job["metadata"]["name"]
        for needs in (NEEDS, None)
    }
    assert len(names) == 1


def test_the_users_service_account_is_not_made() -> None:
    kinds = [made["kind"] for made in objects(*CASES["train-everything"])]
    assert kinds == ["Role", "RoleBinding", "ConfigMap", "Job"]


def test_the_trainer_can_read_its_configuration() -> None:
    config_map = objects(*CASES["train-everything"])[2]
    read = RunConfig.model_validate_json(config_map["data"]["run.json"])
    assert read.resolved == resolved()
    assert read.job is not None
    assert (read.job.namespace, read.job.name) == ("ml", "support")


def test_no_secret_is_named_in_the_configuration() -> None:
    config_map = objects(*CASES["train-everything"])[2]
    for name in ("hub", "bucket", "registry", "wandb", "mlflow"):
        assert f'"{name}"' not in config_map["data"]["run.json"]


def test_only_the_export_gets_the_key_and_the_token_of_publishing() -> None:
    for stage in Stage:
        pod = pod_of(PUBLISHING, stage)
        here = stage is EXPORT
        names = [each["name"] for each in pod["containers"][0]["env"]]
        assert ("FINETUNE_HUB_TOKEN" in names) is here
        assert not [name for name in names if "SIGNING" in name]
        mounted = {each["name"]: each["mountPath"] for each in pod["containers"][0]["volumeMounts"]}
        volumes = {each["name"]: each.get("secret") for each in pod["volumes"]}
        assert mounted.get("signing-key") == ("/etc/finetune-signing" if here else None)
        key = [{"key": "private-key.pem", "path": "private-key.pem"}]
        signer = {"secretName": "signer", "items": key, "defaultMode": 0o400}
        assert volumes.get("signing-key") == (signer if here else None)
        assert mounted.get("registry") == ("/etc/finetune-registry" if here else None)
        login = [{"key": ".dockerconfigjson", "path": "config.json"}]
        docker = {"secretName": "docker", "items": login, "defaultMode": 0o400}
        assert volumes.get("registry") == (docker if here else None)


def test_what_is_pushed_where_is_told_without_the_secrets() -> None:
    config_map = next(o for o in objects(*CASES["export-published"]) if o["kind"] == "ConfigMap")
    text = config_map["data"]["run.json"]
    told = RunConfig.model_validate_json(text)
    assert told.export.signing is not None
    assert told.output.hub is not None
    assert told.output.hub.repo == "org/tuned"
    assert told.output.oci is not None
    assert told.output.oci.repository == "images.example/tuned"
    assert not any(f'"{name}"' in text for name in ("signer", "pusher", "docker"))


def test_how_many_versions_are_kept_and_who_owned_the_folder_is_told() -> None:
    output = {"uri": "s3://models/support", "keepVersions": 3, "takeOverFrom": "ml/former"}
    spec = FineTuneJobSpec.model_validate({**SPEC, "output": output})
    told = spec.run_config(JobReference(namespace="ml", name="support"), None).output
    assert (told.keep_versions, told.take_over_from) == (3, "ml/former")


@pytest.mark.parametrize("part", ["export", "output"])
def test_another_key_or_repository_is_another_job_of_export_alone(part: str) -> None:
    spec = FineTuneJobSpec.model_validate({**SPEC, part: PUBLISHING[part]})
    before = FineTuneJobSpec.model_validate(SPEC)
    for stage in Stage:
        same = pod_settings_digest(spec, stage, SETTINGS) == pod_settings_digest(
            before, stage, SETTINGS
        )
        assert same == (stage is not EXPORT)


def variables(spec: dict[str, Any], stage: Stage) -> set[str]:
    return {each["name"] for each in pod_of(spec, stage)["containers"][0]["env"]}


def test_only_prepare_gets_the_keys_and_certificates_of_the_datasets_store() -> None:
    for stage in Stage:
        found = {name for name in variables(STORES, stage) if "_AWS_" in name}
        kinds = {name.partition("_AWS_")[0] for name in found}
        assert kinds == {"FINETUNE_MODEL", *(["FINETUNE_DATASET"] if stage is PREPARE else [])}
        mounted = [
            each["mountPath"] for each in pod_of(STORES, stage)["containers"][0]["volumeMounts"]
        ]
        assert "/etc/finetune-ca/storage" in mounted
        assert ("/etc/finetune-ca/dataset-storage" in mounted) == (stage is PREPARE)


def test_no_secret_or_config_map_of_a_store_is_named_in_the_configuration() -> None:
    config_map = next(o for o in objects(*CASES["prepare-stores"]) if o["kind"] == "ConfigMap")
    text = config_map["data"]["run.json"]
    assert not any(f'"{name}"' in text for name in ("bucket", "data", "data-ca", "company-ca"))
    told = RunConfig.model_validate_json(text)
    assert told.storage.path_style
    assert told.dataset_storage.endpoint == "https://data.example"
    assert told.model_storage.endpoint is None, "nothing of spec.storage holds for it"
    assert told.model_storage.region == "eu-central-1"


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ({"storage": {"caBundle": {"configMapRef": {"name": "ca"}}}}, set(Stage)),
        ({"dataset": {**SPEC["dataset"], "storage": {"secretRef": {"name": "a"}}}}, {PREPARE}),
        ({"model": {**SPEC["model"], "storage": {"secretRef": {"name": "a"}}}}, set(Stage)),
        ({"model": {**SPEC["model"], "storage": {"region": "eu-central-1"}}}, set()),
    ],
)
def test_another_reference_of_a_store_is_another_job_where_it_is_used(
    change: dict[str, Any], stages: set[Stage]
) -> None:
    spec = FineTuneJobSpec.model_validate({**SPEC, **change})
    before = FineTuneJobSpec.model_validate(SPEC)
    changed = {
        stage
        for stage in Stage
        if pod_settings_digest(spec, stage, SETTINGS)
        != pod_settings_digest(before, stage, SETTINGS)
    }
    assert changed == stages


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ({"caBundle": {}}, "spec.storage.caBundle: must have exactly one of configMapRef and"),
        (
            {"encryption": {"algorithm": "AES256", "kmsKeyId": "a"}},
            "spec.storage.encryption: must have kmsKeyId only with algorithm aws:kms",
        ),
    ],
)
def test_a_store_that_makes_no_sense_is_refused(storage: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        FineTuneJobSpec.model_validate({**SPEC, "storage": storage})
    assert describe(refused.value, prefix="spec.").startswith(said)


def names(spec: dict[str, Any], settings: Settings = SETTINGS, **fields: Any) -> dict[str, str]:
    made = objects(finetunejob(**fields), spec, settings, TRAIN)
    return {each["kind"]: each["metadata"]["name"] for each in made}


def test_the_same_thing_twice_has_one_name() -> None:
    assert names(SPEC) == names(SPEC)


def test_names_begin_with_the_jobs() -> None:
    assert all(name.startswith("support-") for name in names(SPEC).values())


def test_a_job_of_the_same_name_made_anew_shares_no_names() -> None:
    assert not set(names(SPEC).values()) & set(names(SPEC, uid="uid-2").values())


def test_other_content_is_another_config_map() -> None:
    other = {**SPEC, "training": {"seed": 1}}
    assert names(SPEC)["ConfigMap"] != names(other)["ConfigMap"]


def test_another_service_account_gets_another_binding() -> None:
    other = {**SPEC, "serviceAccountName": "mine"}
    assert names(SPEC)["RoleBinding"] != names(other)["RoleBinding"]
    assert names(SPEC)["Role"] == names(other)["Role"]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"stages": {"train": {"image": "other"}}}, id="image"),
        pytest.param({"stages": {"train": {"nodeSelector": {"a": "b"}}}}, id="node selector"),
        pytest.param({"stages": {"train": {"resources": {"limits": {"cpu": 1}}}}}, id="resources"),
        pytest.param({"serviceAccountName": "mine"}, id="service account"),
        pytest.param({"storage": {"secretRef": {"name": "other"}}}, id="secret"),
    ],
)
def test_other_pod_settings_are_another_job(change: dict[str, Any]) -> None:
    assert names(SPEC)["Job"] != names({**SPEC, **change})["Job"]


def test_another_default_image_is_another_job() -> None:
    assert names(SPEC)["Job"] != names(SPEC, Settings(trainer_image="trainer:2"))["Job"]


def test_pod_settings_are_told_apart_by_stage() -> None:
    spec = FineTuneJobSpec.model_validate({**SPEC, "stages": {"train": {"image": "other"}}})
    before = FineTuneJobSpec.model_validate(SPEC)
    assert pod_settings_digest(spec, EXPORT, SETTINGS) == pod_settings_digest(
        before, EXPORT, SETTINGS
    )


def test_what_changes_a_result_is_no_pod_setting() -> None:
    spec = FineTuneJobSpec.model_validate({**SPEC, "training": {"seed": 1}})
    before = FineTuneJobSpec.model_validate(SPEC)
    assert pod_settings_digest(spec, TRAIN, SETTINGS) == pod_settings_digest(
        before, TRAIN, SETTINGS
    )


def test_another_log_format_is_another_job() -> None:
    other = Settings(trainer_image="trainer:1", trainer_log_format="json")
    assert names(SPEC)["Job"] != names(SPEC, other)["Job"]


def with_gpus(count: int, train: dict[str, Any] | None = None, **limits: Any) -> dict[str, Any]:
    resources = {"limits": {"nvidia.com/gpu": count, **limits}}
    return {**SPEC, "stages": {"train": {"resources": resources, **(train or {})}}}


def test_a_node_that_comes_or_goes_changes_what_is_told_and_not_the_job() -> None:
    spec, node = with_gpus(1), {"nvidia.com/gpu.memory": "81559"}
    without = objects(finetunejob(), spec, SETTINGS, PREPARE)
    with_node = objects(finetunejob(), spec, SETTINGS, PREPARE, (node,))
    assert without[-1]["metadata"] == with_node[-1]["metadata"]
    told = RunConfig.model_validate_json(with_node[-2]["data"]["run.json"])
    assert told.hardware == Hardware(gpus=1, gpu_memory_bytes=81559 << 20)


def pod_of(
    spec: dict[str, Any], stage: Stage = TRAIN, settings: Settings = SETTINGS
) -> dict[str, Any]:
    job = objects(finetunejob(), spec, settings, stage)[-1]
    made: dict[str, Any] = job["spec"]["template"]["spec"]
    return made


def shared_memory(pod: dict[str, Any]) -> dict[str, Any] | None:
    return next((v["emptyDir"] for v in pod["volumes"] if v["name"] == "shared-memory"), None)


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        pytest.param(with_gpus(1), None, id="one GPU"),
        pytest.param(with_gpus(2), "8192Mi", id="two GPUs"),
        pytest.param(with_gpus(2, memory="16Gi"), "4096Mi", id="a quarter of the memory limit"),
        pytest.param(with_gpus(2, memory="256Gi"), "8192Mi", id="and no more than 8 GiB"),
        pytest.param(
            with_gpus(2, {"volumes": [{"claimName": "mine", "mountPath": "/dev/shm"}]}),
            None,
            id="the user's own",
        ),
    ],
)
def test_several_gpus_get_shared_memory(spec: dict[str, Any], size: str | None) -> None:
    expected = {"medium": "Memory", "sizeLimit": size} if size else None
    assert shared_memory(pod_of(spec)) == expected
    assert shared_memory(pod_of(spec, EXPORT)) is None


def test_the_nodes_disk_may_be_limited() -> None:
    limited = {**SPEC, "stages": {"train": {"workspace": {"sizeLimit": "100Gi"}}}}
    volumes = {each["name"]: each for each in pod_of(limited)["volumes"]}
    assert volumes["workspace"]["emptyDir"] == {"sizeLimit": "100Gi"}


def test_a_spec_without_the_newer_fields_keeps_its_pods() -> None:
    """Their digest is that of before these fields were there, so no waiting pod is made anew."""
    plain = FineTuneJobSpec.model_validate(SPEC)
    assert pod_settings_digest(plain, TRAIN, SETTINGS) == "346e361a47"


@pytest.mark.parametrize(("stage", "seconds"), [(PREPARE, 60), (TRAIN, 120), (EXPORT, 60)])
def test_the_trainer_knows_its_grace_period(stage: Stage, seconds: int) -> None:
    pod = pod_of(SPEC, stage)
    told = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
    assert pod["terminationGracePeriodSeconds"] == seconds
    assert told["FINETUNE_GRACE_SECONDS"] == str(seconds)


def test_the_trainer_knows_its_job_by_name() -> None:
    made = objects(finetunejob(), SPEC, SETTINGS, TRAIN)[-1]
    env = made["spec"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "FINETUNE_JOB", "value": made["metadata"]["name"]} in env
