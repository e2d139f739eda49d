"""The operator's settings, read once from environment variables named FINETUNE_*."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from finetune_operator.api import JsonObject, ModelCache
from finetune_operator.api.finetunejob import StagesSpec
from finetune_trainer.contract import describe

PREFIX = "FINETUNE_"
EVERY_ADDRESS = "*"


class SettingsError(ValueError):
    """A setting in the environment is missing or invalid."""


def _split(value: object) -> object:
    """A comma-separated list as a person writes it in an environment variable."""
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _parsed(value: object) -> object:
    """What a variable holds as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"it is no JSON: {error}") from error


def _model_cache(value: object) -> ModelCache | None:
    """Where base models are kept, as JSON; nothing where there is no such place."""
    try:
        return ModelCache.model_validate(value) if (value := _parsed(value)) else None
    except ValidationError as error:
        raise ValueError(describe(error)) from error


def _stages(value: object) -> object:
    """Settings of the stages' pods, as JSON."""
    value = _parsed(value)
    try:
        StagesSpec.model_validate(value)
    except ValidationError as error:
        raise ValueError(describe(error)) from error
    return value


def _address(value: str) -> str:
    """An IP address; * stands for all."""
    return value if value == EVERY_ADDRESS else str(ip_address(value))


def _report_url(value: str) -> str:
    """An address with a place for the object's key. A browser is sent there, so no other scheme."""
    places = value.replace("{bucket}", "").replace("{key}", "", 1)
    begins = re.match(r"https?://[^\s{}/]+/", value.replace("{bucket}", "bucket"))
    if value and ("{key}" not in value or not begins or re.search(r"[\s{}]", places)):
        raise ValueError("it must begin with https:// or http:// and have {key}, and may {bucket}")
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
LogFormat = Literal["human", "json"]
Port = Annotated[int, Field(ge=1, le=65535)]


class Settings(BaseModel):
    """How this operator is installed; each field is the variable FINETUNE_<FIELD>."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    trainer_image: Annotated[str, Field(min_length=1)]
    """Trainer image of every stage whose pod settings name no other."""

    stages: Annotated[JsonObject, BeforeValidator(_stages)] = {}
    """What every FineTuneJob's spec.stages holds beside its own settings, as JSON."""

    model_cache: Annotated[ModelCache | None, BeforeValidator(_model_cache)] = None
    """Where every stage finds base models, and keeps those that it fetches, as JSON."""

    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """imagePullPolicy of the stages' pods."""

    image_pull_secrets: Names = ()
    """Secrets, in each FineTuneJob's namespace, that the trainer image is pulled with."""

    trainer_log_format: LogFormat = "human"
    """How the stages log: text for people (human), or one JSON object a line (json)."""

    namespaces: Names = ()
    """Namespaces to watch; empty means all."""

    workers: Annotated[int, Field(ge=1, le=256)] = 16
    """FineTuneJobs reconciled at the same time."""

    health_port: Port = 8080
    """Port of /healthz, /readyz and /metrics."""

    web_port: Port | None = None
    """Port of a read-only web page about FineTuneJobs; empty: there is none."""

    web_address: Annotated[str, AfterValidator(_address)] = "127.0.0.1"
    """Address that the page is served on: by default for this machine and port-forwards; *: all."""

    web_namespaces: Names = ()
    """Namespaces that the page shows; empty means all that are watched."""

    web_report_url: Annotated[str, AfterValidator(_report_url)] = ""
    """Where a browser finds an object of the store, e.g. https://minio.example/{bucket}/{key}."""

    lease: Annotated[str, Field(pattern=r"^([^/]+/[^/]+)?$")] = ""
    """namespace/name of the Lease that says which of several operators acts; empty: this one."""

    lease_seconds: Annotated[float, Field(ge=1, le=3600)] = 10
    """Seconds after which another operator takes the place of one that was killed."""

    identity: Annotated[str, Field(min_length=1)] = socket.gethostname()
    """Name of this operator in the Lease; by default its pod's."""

    resync_seconds: Annotated[float, Field(gt=0)] = 300
    """Seconds between two looks at every FineTuneJob, whether or not something happened."""

    secret_grace_seconds: Annotated[float, Field(ge=0)] = 30
    """Seconds that a Secret may be missing while its pod waits, before that is called Degraded."""

    disruption_limit: Annotated[int, Field(ge=1, le=10000)] = 50
    """Pods that one stage may lose (evicted, preempted, deleted, lost nodes) before it fails."""

    request_timeout_seconds: Annotated[float, Field(gt=0)] = 30
    """Seconds that one request to the API server may take."""

    log_format: LogFormat = "json"
    """Text for people (human), or one JSON object a line (json)."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe level that is logged."""

    @field_validator("web_port")
    @classmethod
    def _apart(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value == info.data.get("health_port"):
            raise PydanticCustomError(
                "same_port", "is FINETUNE_HEALTH_PORT's as well: the web page needs one of its own"
            )
        return value

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Read the settings; raises SettingsError that names each variable at fault."""
        names = {PREFIX + field.upper(): field for field in cls.model_fields}
        # An empty variable is how a chart says "not set".
        given = {names[key]: value for key, value in environment.items() if key in names and value}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise SettingsError(_explain(error)) from error


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        variable = PREFIX + str(item["loc"][0]).upper()
        if item["type"] == "missing":
            lines.append(f"{variable} is not set")
        else:
            lines.append(f"{variable}={item['input']!s}: {item['msg']}")
    return "; ".join(lines)
