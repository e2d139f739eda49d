"""What a run is told: the part of a FineTuneJob's spec that can change its result.

The operator imports these types for its API and writes them to ``run.json``; the trainer reads
that file. So a field is named, described, defaulted and bounded once. Nothing here imports torch.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.alias_generators import to_camel


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


def cel(rule: str, message: str) -> dict[str, Any]:
    """A rule that the API server evaluates (CEL), with the message that a person reads."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message}]}


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


class Quantization(StrEnum):
    """GGUF file types, named as llama.cpp names them."""

    F16 = "F16"
    BF16 = "BF16"
    Q8_0 = "Q8_0"
    Q6_K = "Q6_K"
    Q5_K_M = "Q5_K_M"
    Q4_K_M = "Q4_K_M"


class Model(Base):
    """The base model to fine-tune."""

    source: Annotated[
        str,
        Field(
            min_length=1,
            max_length=1024,
            json_schema_extra=cel(
                "self.startsWith('s3://') || self.startsWith('/')"
                " || self.matches('^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$')",
                "must be org/name on the Hugging Face Hub, s3://bucket/folder, "
                "or the absolute path of a mounted folder",
            ),
        ),
    ]
    """Where the base model is: `org/name` on the Hugging Face Hub, `s3://bucket/folder`, or the
    absolute path of a folder that is mounted into the pods. It must hold safetensors weights."""

    revision: Annotated[str, Field(min_length=1, max_length=256)] = "main"
    """Branch, tag or commit of a Hub model. It is resolved to a commit, which status.lineage
    names; a moving branch retrains when the spec changes next, never by itself."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave it off unless you have read that code."""


class Columns(Base):
    """Which columns of the dataset hold what."""

    instruction: Annotated[str, Field(min_length=1, max_length=256)] = "instruction"
    """Header of the column with what the user says."""

    response: Annotated[str, Field(min_length=1, max_length=256)] = "response"
    """Header of the column with what the model should answer. Loss is computed on this only."""


class Dataset(Base):
    """The examples to learn from."""

    source: Annotated[Location, Field(json_schema_extra=LOCATION_RULE)]
    """A CSV file with a header row: `s3://bucket/key.csv`, or the absolute path of a mounted
    file. It is read as UTF-8 text, so `NA`, `null` and `0012` stay what they are."""

    columns: Columns = Columns()
    """Maps the columns of the file; needed only where they are not `instruction` and `response`."""


class TargetModule(StrEnum):
    """Names of the linear layers that LoRA can adapt, as PEFT spells them."""

    Q = "q_proj"
    K = "k_proj"
    V = "v_proj"
    O = "o_proj"  # noqa: E741 - the letter is the layer's name
    GATE = "gate_proj"
    UP = "up_proj"
    DOWN = "down_proj"


class Lora(Base):
    """The low-rank adapter (PEFT's LoraConfig)."""

    r: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the adapter. Twice the rank is twice the trainable parameters."""

    alpha: Annotated[int, Field(ge=1, le=4096)] = 32
    """Scale of the adapter: its output is multiplied by alpha / r."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the adapter's inputs dropped during training, from 0 up to (not including) 1."""

    target_modules: Annotated[
        tuple[TargetModule, ...],
        Field(min_length=1, max_length=7, json_schema_extra={"x-kubernetes-list-type": "set"}),
    ] = (TargetModule.Q, TargetModule.K, TargetModule.V, TargetModule.O)
    """Linear layers that get an adapter. The default adapts attention only; add gate_proj,
    up_proj and down_proj to adapt the MLP as well."""


class Training(Base):
    """Hyperparameters of the supervised fine-tuning, with the defaults of the guide."""

    method: Literal["lora", "qlora"] = "lora"
    """`lora` keeps the base model in 16 bit; `qlora` loads it in 4 bit (NF4), which takes about a
    quarter of the memory for the weights and is slower. Both are merged into a 16-bit model."""

    lora: Lora = Lora()
    """Size and place of the adapter."""

    epochs: Annotated[
        int | Literal["auto"],
        Field(
            json_schema_extra={
                "x-kubernetes-int-or-string": True,
                **cel(
                    "type(self) == int ? (self >= 1 && self <= 1000) : self == 'auto'",
                    "must be a whole number from 1 to 1000, or auto",
                ),
            }
        ),
    ] = 3
    """Passes over the data, 1 to 1000, or `auto`: 5 for under 500 rows, 3 for up to 5,000 rows,
    2 above."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Peak learning rate of AdamW, above 0 and up to 1. If the loss rises, lower it."""

    batch_size: Annotated[int, Field(ge=1, le=1024)] = 2
    """Examples in one forward pass on one device. Lower it first when memory runs out."""

    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=4096)] = 4
    """Forward passes per optimizer step; the effective batch is this times batchSize."""

    max_sequence_length: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    """Longest example in tokens; what is longer is cut off at the end and counted in
    dataset-report.json."""

    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of all steps in which the learning rate rises from zero to its peak."""

    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """How the learning rate falls after the warmup (transformers' lr_scheduler_type)."""

    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight decay of AdamW."""

    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 42
    """Seed of the adapter's initial weights, the order of the rows and dropout."""

    logging_steps: Annotated[int, Field(ge=1, le=100_000)] = 10
    """Optimizer steps between two lines of loss, learning rate and epoch in the log."""

    @field_validator("epochs")
    @classmethod
    def _epochs_in_range(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 1 <= value <= 1000:
            raise ValueError("must be a whole number from 1 to 1000, or auto")
        return value


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


class Fingerprints(Base):
    """SHA-256 over what can change each stage's result (finetune_trainer.fingerprint)."""

    prepare: str
    """Of the examples."""

    train: str
    """Of the adapter."""

    export: str
    """Of the artifacts."""


class Resolved(Base):
    """What `prepare` found out and the later stages rely on."""

    fingerprints: Fingerprints
    dataset_etag: Annotated[str, Field(alias="datasetETag")]
    """ETag of the dataset's object, or sha256:… of a local file."""

    dataset_rows: int
    """Examples that will be trained on."""

    model_revision: str
    """Commit of a Hub model, or a digest over a folder's file names, sizes and ETags."""


class JobReference(Base):
    """The FineTuneJob whose status.progress the trainer reports to."""

    name: str
    namespace: str


class RunConfig(Base):
    """The whole of ``run.json``."""

    job: JobReference | None = None
    """Absent on one machine without Kubernetes."""

    model: Model
    dataset: Dataset
    training: Training = Training()
    export: Export = Export()
    output: Output
    storage: Storage = Storage()
    resolved: Resolved | None = None
    """Absent for `prepare`, which finds it out; `train` and `export` need it."""


def read_run_config(path: Path) -> RunConfig:
    """Read ``run.json``; raises OSError and pydantic's ValidationError."""
    return RunConfig.model_validate_json(path.read_bytes())


def describe(error: ValidationError, prefix: str = "") -> str:
    """Say per field what is wrong, e.g. ``spec.training.epochs: must be …``, in one line."""
    lines = []
    for item in error.errors(include_url=False):
        path = ".".join(to_camel(p) if isinstance(p, str) else str(p) for p in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        given = "" if item["type"] == "missing" else f" (got {item['input']!r:.60})"
        lines.append(f"{prefix}{path}: {message}{given}")
    return "; ".join(dict.fromkeys(lines))
