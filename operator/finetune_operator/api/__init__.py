"""Types that the API takes from Kubernetes, and the labels and annotations of the children."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from finetune_trainer.contract import GROUP, VERSION, Base, cel, parse_duration

OPERATOR = "finetune-operator"
TRAINER_CONTAINER = "trainer"

MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
CHILDREN_SELECTOR = f"{MANAGED_BY_LABEL}={OPERATOR}"

# Labels
FINETUNEJOB_LABEL = f"{GROUP}/job"  # the FineTuneJob's name, cut to fit a label, for `kubectl -l`
FINETUNEJOB_UID_LABEL = f"{GROUP}/job-uid"
STAGE_LABEL = f"{GROUP}/stage"
ATTEMPT_LABEL = f"{GROUP}/attempt"

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"  # Kueue's, on a Job

# Annotations, which may be longer
FINETUNEJOB_NAME_ANNOTATION = f"{GROUP}/job-name"  # the whole name
STAGE_KEY_ANNOTATION = f"{GROUP}/key"  # the stage's fingerprint, or `prepare`'s look
RETRY_ANNOTATION = f"{GROUP}/retry-requested-at"  # on a FineTuneJob, and the user's
WOKEN_ANNOTATION = f"{GROUP}/woken-at"  # when the operator last touched the Job
GPUS_ANNOTATION = f"{GROUP}/gpus"  # on a pod: the GPUs of its resource claims
POD_SETTINGS_ANNOTATION = f"{GROUP}/pod-settings"  # digest of the settings of its pods

KIND = "FineTuneJob"
API_VERSION = f"{GROUP}/{VERSION}"

JsonObject = dict[str, Any]  # a Kubernetes object, or a part of one, as the API server writes it

Name = Annotated[str, Field(min_length=1, max_length=253)]
DnsLabel = Annotated[
    str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
]
FileName = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")]
Quantity = Annotated[int | str, Field(json_schema_extra={"x-kubernetes-int-or-string": True})]

ON_EDIT = "onEdit"
_SHORTEST_REFRESH = timedelta(minutes=1)
_REFRESH_SAID = f"must be {ON_EDIT}, or an interval of 1m or more, such as 30m, 6h or 1h30m"


def _check_refresh(text: str) -> str:
    try:
        short = text != ON_EDIT and parse_duration(text) < _SHORTEST_REFRESH
    except ValueError:
        short = True
    if short:
        raise ValueError(_REFRESH_SAID)
    return text


Refresh = Annotated[
    str,
    Field(
        min_length=2,
        max_length=18,
        json_schema_extra=cel(
            f"self == '{ON_EDIT}' || (self.matches('^([0-9]{{1,5}}h)?([0-9]{{1,5}}m)?"
            "([0-9]{1,5}s)?$') && duration(self) >= duration('1m'))",
            _REFRESH_SAID,
        ),
    ),
    AfterValidator(_check_refresh),
]
Preserved = Annotated[
    dict[str, Any], Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})
]


class SecretReference(Base):
    """A Secret in the FineTuneJob's namespace."""

    name: Name
    """Name of the Secret."""


class SecretKeyReference(Base):
    """One key of a Secret in the FineTuneJob's namespace."""

    name: Name
    """Name of the Secret."""

    key: Name = "token"
    """Key within the Secret."""


class PrivateKeyReference(SecretKeyReference):
    """A private key in a Secret in the FineTuneJob's namespace."""

    key: Name = "private-key.pem"
    """Key within the Secret."""


class CertificatesReference(Base):
    """One key of a ConfigMap or Secret in the FineTuneJob's namespace, with PEM certificates."""

    name: Name
    """Name of the ConfigMap or Secret."""

    key: FileName = "ca.crt"
    """Key within it."""


ONE_SOURCE = "must have exactly one of configMapRef and secretRef"


class CaBundle(Base):
    """Certificates to trust beside the public ones."""

    model_config = ConfigDict(
        json_schema_extra=cel("has(self.configMapRef) != has(self.secretRef)", ONE_SOURCE)
    )

    config_map_ref: CertificatesReference | None = None
    """A ConfigMap with the certificates."""

    secret_ref: CertificatesReference | None = None
    """A Secret with the certificates."""

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.config_map_ref is None) == (self.secret_ref is None):
            raise ValueError(ONE_SOURCE)
        return self


class SecretKeySelector(Base):
    """One key of a Secret in the FineTuneJob's namespace (core/v1 SecretKeySelector)."""

    name: Name
    """Name of the Secret."""

    key: Name
    """Key within the Secret."""

    optional: bool = False
    """Start the pod without the variable where the Secret or the key isn't there."""


class EnvVarSource(Base):
    """Where the value of an environment variable comes from."""

    secret_key_ref: SecretKeySelector
    """A key of a Secret. The kubelet reads it; the operator may not."""


ONE_VALUE = "must have exactly one of value and valueFrom"


class EnvVar(Base):
    """An environment variable: a plain value, or a key of a Secret."""

    model_config = ConfigDict(
        json_schema_extra=cel("has(self.value) != has(self.valueFrom)", ONE_VALUE)
    )

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=256)]
    """Name of the variable."""

    value: Annotated[str, Field(max_length=32768)] | None = None
    """Its value, for all to read; credentials belong in a Secret."""

    value_from: EnvVarSource | None = None
    """Where its value comes from, e.g. for WANDB_API_KEY or MLFLOW_TRACKING_TOKEN."""

    @model_validator(mode="after")
    def _has_one_value(self) -> Self:
        if (self.value is None) == (self.value_from is None):
            raise ValueError(ONE_VALUE)
        return self


class Resources(Base):
    """Compute resources of a container (core/v1 ResourceRequirements)."""

    requests: dict[str, Quantity] = {}
    """What the scheduler sets aside, e.g. `cpu: 4`, `memory: 16Gi`."""

    limits: dict[str, Quantity] = {}
    """What the container may use at most, e.g. `nvidia.com/gpu: 1`."""


ONE_CLAIM = "must have exactly one of resourceClaimName and resourceClaimTemplateName"


class ResourceClaim(Base):
    """Devices that dynamic resource allocation gives to the pod, and to the trainer in it (core/v1
    PodResourceClaim; Kubernetes 1.34)."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            "has(self.resourceClaimName) != has(self.resourceClaimTemplateName)", ONE_CLAIM
        )
    )

    name: DnsLabel
    """Name of the claim within the pod."""

    resource_claim_name: Name | None = None
    """A ResourceClaim in the FineTuneJob's namespace, which pods may share."""

    resource_claim_template_name: Name | None = None
    """A ResourceClaimTemplate in the FineTuneJob's namespace, of which each pod gets a
    ResourceClaim of its own."""

    gpus: Annotated[int, Field(ge=0, le=64)] = 1
    """GPUs, or slices of one, that the claim comes to: the number that it requests. Zero for other
    devices, e.g. a network card. spec.training.gpuMemory tells how much memory each has; left out,
    the training's pod finds out."""

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.resource_claim_name is None) == (self.resource_claim_template_name is None):
            raise ValueError(ONE_CLAIM)
        return self


class Toleration(Base):
    """A taint that the pod may be scheduled onto (core/v1 Toleration)."""

    key: str | None = None
    """Key of the taint; left out with operator Exists it matches every taint."""

    operator: Literal["Exists", "Equal"] = "Equal"
    """How key and value are compared."""

    value: str | None = None
    """Value of the taint, with operator Equal."""

    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; left out it matches every effect."""

    toleration_seconds: int | None = None
    """Seconds that a NoExecute taint is tolerated; left out, for ever."""


class ConfigMapSource(Base):
    """A ConfigMap in the FineTuneJob's namespace (core/v1 ConfigMapVolumeSource)."""

    name: Name
    """Name of the ConfigMap; each of its keys is a file."""


class SecretSource(Base):
    """A Secret in the FineTuneJob's namespace (core/v1 SecretVolumeSource)."""

    secret_name: Name
    """Name of the Secret; each of its keys is a file. The operator may not read it."""


class ImageSource(Base):
    """A container image whose files are mounted (core/v1 ImageVolumeSource; Kubernetes 1.35, or
    1.33 with the feature gate ImageVolume)."""

    reference: Annotated[str, Field(min_length=1, max_length=1024)]
    """The image, e.g. `registry.example.com/models/llama:1`; by digest it never changes."""

    pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """When the node fetches it; left out, as for containers."""


VOLUME_SOURCES = ("claimName", "configMap", "secret", "image")
ONE_VOLUME_SOURCE = f"must have exactly one of {', '.join(VOLUME_SOURCES)}"


ONE_CACHE = "must have exactly one of persistentVolumeClaim and image"


class ClaimSource(Base):
    """A PersistentVolumeClaim (core/v1 PersistentVolumeClaimVolumeSource)."""

    claim_name: Name
    """Its name, in the namespace of each FineTuneJob."""

    read_only: bool = False
    """Mount it read-only: what it doesn't hold is fetched by each stage."""


class ModelCache(Base):
    """Where base models of all FineTuneJobs are kept (the chart's modelCache)."""

    persistent_volume_claim: ClaimSource | None = None
    """A volume to which the first stage that needs a model brings it."""

    image: ImageSource | None = None
    """An image that holds models already, below its root as in a cache of the Hub's client."""

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.persistent_volume_claim is None) == (self.image is None):
            raise ValueError(ONE_CACHE)
        return self


class Volume(Base):
    """Something to mount, e.g. a PersistentVolumeClaim that holds the base model."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            f"[{', '.join(f'has(self.{each})' for each in VOLUME_SOURCES)}]"
            ".filter(given, given).size() == 1",
            ONE_VOLUME_SOURCE,
        )
    )

    claim_name: Name | None = None
    """Name of a PersistentVolumeClaim in the FineTuneJob's namespace."""

    config_map: ConfigMapSource | None = None
    """A ConfigMap, which is mounted read-only."""

    secret: SecretSource | None = None
    """A Secret, which is mounted read-only."""

    image: ImageSource | None = None
    """An image, which is mounted read-only: a base model that each node fetches once."""

    mount_path: Annotated[str, Field(min_length=2, max_length=1024, pattern="^/")]
    """Absolute path at which it is mounted."""

    read_only: bool = False
    """Mount the PersistentVolumeClaim read-only."""

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        given = [self.claim_name, self.config_map, self.secret, self.image]
        if sum(each is not None for each in given) != 1:
            raise ValueError(ONE_VOLUME_SOURCE)
        return self


ONE_WORKSPACE = "must have sizeLimit, or storage, and storageClassName with storage alone"


class Workspace(Base):
    """The disk that a pod works on: model, checkpoints, what it makes."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            "has(self.storage) ? !has(self.sizeLimit) : !has(self.storageClassName)", ONE_WORKSPACE
        )
    )

    size_limit: Quantity | None = None
    """Evict the pod where it uses more of the node's disk than this (emptyDir)."""

    storage: Quantity | None = None
    """Size of a volume that is made for each pod and deleted with it (generic ephemeral volume), in
    place of the node's disk."""

    storage_class_name: Name | None = None
    """StorageClass of that volume; left out, the cluster's default."""

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        both = self.storage is not None and self.size_limit is not None
        if both or (self.storage is None and self.storage_class_name is not None):
            raise ValueError(ONE_WORKSPACE)
        return self


class Condition(Base):
    """The standard condition (meta/v1 Condition)."""

    type: str
    """Ready, Progressing or Degraded; Reconciling, Stalled or VersionSkew where they hold."""

    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""

    reason: str
    """A CamelCase word for machines."""

    message: str = ""
    """A sentence for people."""

    observed_generation: int
    """The metadata.generation that this was said of."""

    last_transition_time: str
    """When status last changed (RFC 3339)."""
