"""spec.export, spec.output and spec.storage."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_trainer.config.base import LOCATION_RULE, Base, Location, cel


class Quantization(StrEnum):
    """GGUF file types, named as llama.cpp names them."""

    F16 = "F16"
    BF16 = "BF16"
    Q8_0 = "Q8_0"
    Q6_K = "Q6_K"
    Q5_K_M = "Q5_K_M"
    Q4_K_M = "Q4_K_M"


class Export(Base):
    """The artifacts to write beside the adapter."""

    merged: bool = True
    """Write the merged model (base plus adapter, 16-bit safetensors) as well."""

    gguf: Annotated[
        tuple[Quantization, ...],
        Field(max_length=6, json_schema_extra={"x-kubernetes-list-type": "set"}),
    ] = (Quantization.F16, Quantization.Q8_0, Quantization.Q4_K_M)
    """GGUF files to write, one per type. F16 is exact and largest; Q8_0 is nearly as good at half
    the size; Q4_K_M is the usual choice for serving on small machines."""


class Output(Base):
    """Where the artifacts go."""

    uri: Annotated[Location, Field(json_schema_extra=LOCATION_RULE)]
    """The folder for everything that the job writes: `s3://bucket/prefix` or an absolute path.
    Give each FineTuneJob its own. manifest.json is written last: when it is there, all is there."""


class Storage(Base):
    """How to reach the object store of every `s3://` URI in the spec."""

    endpoint: Annotated[
        str | None,
        Field(
            max_length=512,
            json_schema_extra=cel(
                "self.startsWith('http://') || self.startsWith('https://')",
                "must start with http:// or https://",
            ),
        ),
    ] = None
    """URL of an S3-compatible store such as MinIO or SeaweedFS. Leave it out for Amazon S3."""

    region: Annotated[str, Field(min_length=1, max_length=64)] = "us-east-1"
    """Region of the buckets."""
