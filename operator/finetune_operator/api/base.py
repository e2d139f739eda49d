"""Kubernetes types that the API borrows, cut down to the fields that make sense here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from finetune_trainer.config import Base

GROUP = "finetune.dev"
VERSION = "v1alpha1"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"
API_VERSION = f"{GROUP}/{VERSION}"

Name = Annotated[str, Field(min_length=1, max_length=253)]
Quantity = Annotated[int | str, Field(json_schema_extra={"x-kubernetes-int-or-string": True})]
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


class EnvVar(Base):
    """An environment variable with a plain value; credentials belong in a Secret."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=256)]
    """Name of the variable."""

    value: Annotated[str, Field(max_length=32768)] = ""
    """Its value."""


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
    """Ready, Progressing or Degraded."""

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
