"""spec.storage, and the stores of dataset and model where they are others."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from finetune_trainer.contract.base import Base, cel

KEY_ONLY_WITH_KMS = "must have kmsKeyId only with algorithm aws:kms"
CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL_S3",
)
"""Keys of a store's Secret, and names of the variables that the trainer finds them in; those of a
store of its own have its `variables` before them. The last two are optional."""

CA_BUNDLES = "FINETUNE_CA_BUNDLES"
"""Variable with the files of certificates that the trainer trusts beside the public ones: field and
path each, as in `spec.storage.caBundle=/path/ca.crt`, separated by colons."""


class Encryption(Base):
    """How the store encrypts what is written: the headers of server-side encryption."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            "!has(self.kmsKeyId) || self.algorithm == 'aws:kms'", KEY_ONLY_WITH_KMS
        )
    )

    algorithm: Literal["AES256", "aws:kms"]
    """`AES256` for keys that the store keeps, `aws:kms` for a key of its key service."""

    kms_key_id: Annotated[str, Field(min_length=1, max_length=2048)] | None = None
    """Id or ARN of the key, with aws:kms; left out, it is the bucket's or the account's."""

    @model_validator(mode="after")
    def _has_key_only_with_kms(self) -> Self:
        if self.kms_key_id is not None and self.algorithm != "aws:kms":
            raise ValueError(KEY_ONLY_WITH_KMS)
        return self


class Storage(Base):
    """How to reach the object store of every `s3://` URI in the spec."""

    field: ClassVar[str] = "spec.storage"
    """Where a user writes it."""

    variables: ClassVar[str] = ""
    """What the names of its CREDENTIALS begin with."""

    endpoint: Annotated[
        str | None,
        Field(
            max_length=512,
            json_schema_extra=cel(
                "self.startsWith('http://') || self.startsWith('https://')",
                "must start with http:// or https://",
                (
                    "!self.matches('^[a-z]+://[^/]*@')",
                    "must have no user or password in it: keys belong in the Secret of secretRef",
                ),
            ),
        ),
    ] = None
    """URL of an S3-compatible store such as MinIO or SeaweedFS. Leave it out for Amazon S3."""

    region: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """Region of the buckets. Left out, it is the environment's (AWS_REGION or AWS_DEFAULT_REGION,
    which workload identity sets on EKS), else us-east-1."""

    path_style: bool | None = None
    """Whether the bucket's name is in the path (`true`) or in the host (`false`). Left out, it is
    in the path with an endpoint of your own, which most such stores want, and in the host on
    Amazon S3."""

    encryption: Encryption | None = None
    """Ask for server-side encryption with each write; left out, the bucket's own setting holds."""


class DatasetStorage(Storage):
    """How to reach the object store of dataset.source and dataset.evalSource."""

    field: ClassVar[str] = "spec.dataset.storage"
    variables: ClassVar[str] = "FINETUNE_DATASET_"


class ModelStorage(Storage):
    """How to reach the object store of model.source."""

    field: ClassVar[str] = "spec.model.storage"
    variables: ClassVar[str] = "FINETUNE_MODEL_"
