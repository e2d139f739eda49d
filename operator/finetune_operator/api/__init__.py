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
POD_SETTINGS_ANNOTATION = f"{GROUP}/pod-settings"  # digest of the settings of its pods

KIND = "FineTuneJob"
API_VERSION = f"{GROUP}/{VERSION}"

JsonObject = dict[str, Any]  # a Kubernetes object, or a part of one, as the API server writes it

Name = Annotated[str, Field(min_length=1, max_length=253)]
LabelValue = Annotated[
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


class Volume(Base):
    """A PersistentVolumeClaim to mount, e.g. one that holds the base model."""

    claim_name: Name
    """Name of the PersistentVolumeClaim in the FineTuneJob's namespace."""

    mount_path: Annotated[str, Field(min_length=2, max_length=1024, pattern="^/")]
    """Absolute path at which it is mounted."""

    read_only: bool = False
    """Mount it read-only."""


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
