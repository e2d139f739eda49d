"""What all types of run.json have in common."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from finetune_trainer.contract.redaction import redact

GROUP, VERSION, PLURAL = "finetune.dev", "v1alpha1", "finetunejobs"  # the API's address


class Base(BaseModel):
    """A frozen value with camelCase keys that refuses what it does not know."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


def cel(rule: str, message: str, *more: tuple[str, str]) -> dict[str, Any]:
    """Rules that the API server evaluates (CEL), each with the message that a person reads."""
    rules = [{"rule": rule, "message": text} for rule, text in ((rule, message), *more)]
    return {"x-kubernetes-validations": rules}


LOCATION_RULE = cel(
    "self.startsWith('s3://') || self.startsWith('/')",
    "must be an s3://bucket/key URI or the absolute path of a mounted folder",
)
Location = Annotated[str, Field(min_length=2, max_length=1024)]


class Stage(StrEnum):
    """The three steps of a run, in order; each is a subcommand of ``finetune-trainer``."""

    PREPARE = "prepare"
    TRAIN = "train"
    EXPORT = "export"


def describe(error: ValidationError, prefix: str = "") -> str:
    """Say per field what is wrong, e.g. ``spec.training.epochs: must be …``, in one line."""
    lines = []
    for item in error.errors(include_url=False):
        path = ".".join(to_camel(p) if isinstance(p, str) else str(p) for p in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        given = "" if item["type"] == "missing" else f" (got {redact(repr(item['input'])):.60})"
        lines.append(f"{prefix}{path}: {message}{given}")
    return "; ".join(dict.fromkeys(lines))
