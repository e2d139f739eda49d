"""spec.export, spec.output and spec.storage, and the stores of dataset and model beside it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from finetune_trainer.contract.base import LOCATION_RULE, Base, Location, cel


class Quantization(StrEnum):
    """GGUF file types, named as llama.cpp names them; the largest first."""

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    Q8_0 = "Q8_0"
    Q6_K = "Q6_K"
    Q5_K_M = "Q5_K_M"
    Q4_K_M = "Q4_K_M"
    IQ4_XS = "IQ4_XS"
    Q3_K_M = "Q3_K_M"
    IQ3_M = "IQ3_M"
    IQ3_S = "IQ3_S"
    IQ3_XS = "IQ3_XS"
    IQ3_XXS = "IQ3_XXS"
    IQ2_M = "IQ2_M"
    IQ2_S = "IQ2_S"
    IQ2_XS = "IQ2_XS"
    IQ2_XXS = "IQ2_XXS"


UNQUANTIZED = (Quantization.F32, Quantization.F16, Quantization.BF16)
"""Types that hold weights as they are; the quantizations are made of one of them."""


NEED_IMPORTANCE = tuple(kind for kind in Quantization if kind.startswith(("IQ2", "IQ3")))
"""Types of two and three bits. llama.cpp writes most of them with an importance matrix only
(src/llama-quant.cpp, tensor_requires_imatrix), and without one the others are no good."""


IMPORTANCE_TYPES = (
    Quantization.Q6_K,
    Quantization.Q5_K_M,
    Quantization.Q4_K_M,
    Quantization.IQ4_XS,
    Quantization.Q3_K_M,
    *NEED_IMPORTANCE,
)
"""Types whose blocks llama.cpp fits with an importance matrix, the more so the fewer bits they have
(ggml-quants.c; its Q8_0 ignores one)."""


MOST_FILES = 9
"""GGUF files of one export, so that status can hold the figures of all of them."""


class QualityLimit(Base):
    """How far a GGUF file of one type may be from what it is held against: a quantization from the
    16-bit file that it is made of, types without quantization from base model and adapter."""

    quantization: Quantization
    """The type that the limit is for."""

    max_kl_divergence: Annotated[float, Field(alias="maxKLDivergence", gt=0, le=100)]
    """Largest mean Kullback-Leibler divergence of the next token, in nats per token, over the
    answers of the held-out rows."""


SIGNING_KEY_FILE = "/etc/finetune-signing/private-key.pem"
"""Where the pod of `export` has the private key that spec.export.signing names."""


class Signing(Base):
    """Sign the artifacts, offline and with a private key: model.sig, in the format of
    model-signing (OpenSSF)."""


IMPORTANCE_NEEDED = "must have importanceMatrix: true with the types IQ2 and IQ3 in gguf"


class Export(Base):
    """The artifacts to write beside the adapter."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            "!has(self.gguf) || !self.gguf.exists(t, t.startsWith('IQ2') || t.startsWith('IQ3'))"
            " || (has(self.importanceMatrix) && self.importanceMatrix)",
            IMPORTANCE_NEEDED,
        )
    )

    merged: bool = True
    """Write the merged model (base plus adapter, 16-bit safetensors) as well."""

    merged_fp8: bool = False
    """Write the merged model in FP8 as well, at about half the size: merged-fp8/, in the format of
    compressed-tensors, which vLLM serves on GPUs since Ada and Hopper. Weights have a scale for
    each output channel; activations are scaled as they come, so no data is needed."""

    gguf: Annotated[
        tuple[Quantization, ...],
        Field(max_length=MOST_FILES, json_schema_extra={"x-kubernetes-list-type": "set"}),
    ] = (Quantization.F16, Quantization.Q8_0, Quantization.Q4_K_M)
    """GGUF files to write, one per type, nine at most. F16 is exact and largest; Q8_0 is nearly as
    good at half the size; Q4_K_M is the usual choice for serving on small machines. The types IQ2
    and IQ3 are for large models in little memory, and need importanceMatrix."""

    adapter_gguf: bool | None = None
    """Write the adapter alone as a GGUF file, which llama.cpp and Ollama apply to a GGUF file of
    the base model. Left out, it is written beside GGUF files if llama.cpp can apply it (DoRA it
    can't)."""

    importance_matrix: bool = False
    """Measure on training rows which weights matter most, and let the quantizations below Q8_0
    spare those. Better small files for some minutes of computing."""

    verify: Literal["fail", "warn", "off"] = "fail"
    """Compare the merged model and each GGUF file with the tuned model on held-out rows. With
    `fail` a file that is over its limit beyond doubt goes to rejected/ and the job ends as
    QualityGateFailed; `warn` only reports; `off` looks at nothing."""

    quality_limits: Annotated[
        tuple[QualityLimit, ...],
        Field(
            max_length=len(Quantization),
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["quantization"],
            },
        ),
    ] = ()
    """Limits of your own in place of those that follow from type and model size."""

    signing: Signing | None = None
    """Sign the artifacts; left out, they are not signed."""

    @property
    def measures_importance(self) -> bool:
        """Whether an importance matrix is asked for, and a type takes one."""
        return self.importance_matrix and not set(self.gguf).isdisjoint(IMPORTANCE_TYPES)

    @model_validator(mode="after")
    def _has_the_matrix_that_types_need(self) -> Self:
        if not self.importance_matrix and set(self.gguf) & set(NEED_IMPORTANCE):
            raise ValueError(IMPORTANCE_NEEDED)
        return self


class PrivateFile(StrEnum):
    """Files that name buckets or quote rows of the dataset."""

    REPORT = "report.html"
    DATASET_REPORT = "dataset-report.json"
    MANIFEST = "manifest.json"
    PROVENANCE = "provenance.json"


class Hub(Base):
    """A model repository on the Hugging Face Hub that the artifacts are pushed to as well."""

    repo: Annotated[
        str,
        Field(
            min_length=3,
            max_length=193,
            json_schema_extra=cel(
                "self.matches('^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$')",
                "must be org/name of a repository on the Hugging Face Hub",
            ),
        ),
    ]
    """The repository, `org/name`. It is created where it doesn't exist."""

    private: bool = True
    """Whether the repository is to be private. One that exists stays as it is; if it is public, a
    push is refused unless this is false."""

    include: Annotated[
        tuple[PrivateFile, ...],
        Field(max_length=len(PrivateFile), json_schema_extra={"x-kubernetes-list-type": "set"}),
    ] = ()
    """Push these as well. They name buckets, and quote rows and answers: report.html,
    dataset-report.json, provenance.json, and the whole manifest.json, of which else a part without
    these goes."""

    revision: Annotated[str, Field(min_length=1, max_length=256)] = "main"
    """Branch to push to; it is created where it doesn't exist."""


MODEL_FOLDERS = ("merged", "merged-fp8", "adapter")
IMAGE_CONTENTS = (*MODEL_FOLDERS, *map(str, Quantization))
"""What an image can be of: a folder of the version, or the GGUF file of one type."""


def _is_image_content(name: str) -> str:
    if name not in IMAGE_CONTENTS:
        raise ValueError(f"must be one of {', '.join(IMAGE_CONTENTS)}")
    return name


ImageContent = Annotated[
    str,
    AfterValidator(_is_image_content),
    Field(json_schema_extra={"enum": list(IMAGE_CONTENTS)}),
]


class Oci(Base):
    """A repository of a container registry that the models are pushed to as well, one image for
    each: Kubernetes mounts it as an image volume."""

    repository: Annotated[
        str,
        Field(
            min_length=3,
            max_length=255,
            json_schema_extra=cel(
                "self.matches('^[a-zA-Z0-9.-]+(:[0-9]+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)+$')",
                "must be a registry's host and a path without a tag, such as "
                "registry.example.com/team/model",
            ),
        ),
    ]
    """The repository: a registry's host and a path, such as registry.example.com/team/model."""

    tag: Annotated[
        str | None,
        Field(
            max_length=100,
            json_schema_extra=cel(
                "self.matches('^[A-Za-z0-9_][A-Za-z0-9._-]*$')",
                "must consist of letters, digits, '.', '_' and '-'",
            ),
        ),
    ] = None
    """What the tags begin with: an image's tag is `<tag>-<model>`, such as v1-Q4_K_M or v1-merged.
    Left out, it is the version's name, so that no tag ever moves. status.images has the
    digests."""

    include: (
        Annotated[
            tuple[ImageContent, ...],
            Field(
                min_length=1,
                max_length=len(IMAGE_CONTENTS),
                json_schema_extra={"x-kubernetes-list-type": "set"},
            ),
        ]
        | None
    ) = None
    """The models to push, each as an image of its own, since a pod mounts one: `merged`,
    `merged-fp8`, `adapter`, or types of export.gguf. Left out, it is all that spec.export writes
    but the adapter."""

    format: Literal["image", "modelPack"] = "image"
    """`image` for what container runtimes unpack: image volumes of Kubernetes, and KServe.
    `modelPack` for the CNCF's format of the same layers, which model tools and the Model CSI
    driver read, and container runtimes don't."""

    insecure: bool = False
    """Speak HTTP without encryption, to a registry that has no certificate. No password is sent
    then."""

    def contents(self, export: Export) -> tuple[str, ...]:
        """The models to push."""
        return self.include if self.include is not None else written_models(export)


def written_models(export: Export) -> tuple[str, ...]:
    """The models that an export writes beside the adapter, as images are named."""
    folders = (("merged", export.merged), ("merged-fp8", export.merged_fp8))
    return (*(name for name, asked in folders if asked), *map(str, export.gguf))


REGISTRY_FILE = "/etc/finetune-registry/config.json"
"""Where the pod of `export` has the Secret of spec.output.oci: a configuration of Docker's."""


VersionName = Annotated[
    str,
    Field(
        max_length=12,
        json_schema_extra=cel(
            "self.matches('^[0-9a-f]{12}$')",
            "must be a version's name, 12 characters as in status.versions",
        ),
    ),
]


class Output(Base):
    """Where the artifacts go."""

    uri: Annotated[Location, Field(json_schema_extra=LOCATION_RULE)]
    """The folder for everything that the job writes: `s3://bucket/prefix` or an absolute path.
    Its manifest.json names the current version in versions/; status.artifacts has the files. It
    belongs to the FineTuneJob that wrote to it first: give each its own."""

    hub: Hub | None = None
    """Push the artifacts to the Hugging Face Hub, once all of them are in the folder."""

    oci: Oci | None = None
    """Push the models to a container registry, once all of them are in the folder."""

    keep_versions: Annotated[int, Field(ge=1)] | None = None
    """How many versions to keep: the current one and the newest of the others. What is older, and
    what only that was made from, is deleted when a new version is there and current. Left out, all
    are kept, since somebody may be serving an old one."""

    take_over_from: Annotated[
        str | None,
        Field(
            max_length=317,
            json_schema_extra=cel(
                "self.matches('^[a-z0-9.-]+/[a-z0-9.-]+$')",
                "must be namespace/name of the FineTuneJob that the folder belongs to",
            ),
        ),
    ] = None
    """Take the folder over from this FineTuneJob (`namespace/name`), which may then no longer write
    to it. Without it a folder that belongs to another FineTuneJob is refused (OutputInUse)."""

    @property
    def folder(self) -> str:
        """`uri` in one spelling: no slash at the end, and none that follows another."""
        scheme, mark, path = self.uri.partition("://")
        if not mark:
            scheme, path = "/" if self.uri.startswith("/") else "", self.uri
        return scheme + mark + "/".join(filter(None, path.split("/")))


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
