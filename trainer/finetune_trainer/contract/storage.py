"""spec.storage."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_trainer.contract.base import Base, cel


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
