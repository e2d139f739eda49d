"""What a run is told: the part of a FineTuneJob's spec that can change its result.

The operator imports these types for its API and writes them to ``run.json``; the trainer reads
that file. So a field is named, described, defaulted and bounded once. Nothing here imports torch.
"""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)
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


ColumnName = Annotated[str, Field(min_length=1, max_length=256)]

COUNT_OR_SHARE: dict[str, Any] = {
    "x-kubernetes-int-or-string": True,
    **cel(
        "type(self) == int ? self >= 0 : self.matches('^(100|[0-9]{1,2})%$')",
        "must be a whole number from 0, or a percentage such as 10%",
    ),
}
"""Schema of a count or a percentage, as Kubernetes writes maxUnavailable."""


def _check_count_or_share(value: int | str) -> int | str:
    if isinstance(value, int):
        if value < 0:
            raise ValueError("must be a whole number from 0, or a percentage such as 10%")
    elif not re.fullmatch(r"(100|[0-9]{1,2})%", value):
        raise ValueError("must be a whole number from 0, or a percentage such as 10%")
    return value


CountOrShare = Annotated[
    int | str, AfterValidator(_check_count_or_share), Field(json_schema_extra=COUNT_OR_SHARE)
]


def allowed(limit: int | str, total: int) -> int:
    """How many of `total` a CountOrShare allows; a share is rounded down."""
    return limit if isinstance(limit, int) else total * int(limit[:-1]) // 100


class DataFormat(StrEnum):
    """File formats of a dataset; each may be gzipped."""

    AUTO = "auto"
    CSV = "csv"
    JSONL = "jsonl"
    PARQUET = "parquet"


class Columns(Base):
    """Which columns (or JSON keys) of the dataset hold what. Where the file has none of the
    columns named here but `messages`, or `prompt` and `completion`, those are used."""

    instruction: ColumnName = "instruction"
    """Column with what the user says."""

    response: ColumnName = "response"
    """Column with what the model should answer. Loss is computed on this only."""

    input: ColumnName | None = None
    """Column with further input that belongs to the instruction; it follows it after a blank line
    and may be empty. Left out, a column named `input` is used if there is one."""

    system: ColumnName | None = None
    """Column with a system prompt per row; an empty cell means spec.dataset.systemPrompt."""

    messages: ColumnName | None = None
    """Column with whole conversations: a list of `{role, content}`, ending with the assistant's
    answer. It takes the place of the other columns."""


class Dataset(Base):
    """The examples to learn from."""

    source: Annotated[Location, Field(json_schema_extra=LOCATION_RULE)]
    """A table with a header: `s3://bucket/key.csv`, or the absolute path of a mounted file; CSV,
    JSON lines or Parquet, gzipped or not. Cells are text: `NA`, `null` and `0012` stay what they
    are."""

    format: DataFormat = DataFormat.AUTO
    """`auto` looks at the content, or name it: csv, jsonl or parquet. The delimiter, quoting and
    encoding of a CSV file are detected and named in dataset-report.json."""

    columns: Columns = Columns()
    """Maps the columns of the file; needed only where they are not `instruction` and `response`."""

    system_prompt: Annotated[str, Field(max_length=16384)] | None = None
    """System prompt of every example. Left out, there is none, except what the model's chat
    template adds by itself."""

    on_invalid_row: Literal["fail", "skip"] = "fail"
    """What a blank, ragged or unreadable row does: `fail` ends the job before anything is trained
    and names the rows; `skip` leaves them out, up to maxInvalidRows."""

    max_invalid_rows: CountOrShare = "10%"
    """With onInvalidRow `skip`: how many rows may be left out, as a number or as a percentage of
    all rows; more end the job."""

    max_truncated_rows: CountOrShare = "10%"
    """How many rows may be longer than training.maxSequenceLength, as a number or as a percentage
    of all rows. They are cut at the end and counted in dataset-report.json; more end the job."""

    eval_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """Share of the rows that are held out to measure the loss before and after the training, from
    0 to 0.5; at least one row from 20 rows on, none below, and never more than 1,000. The choice
    depends on the rows and training.seed only."""

    eval_source: Annotated[Location, Field(json_schema_extra=LOCATION_RULE)] | None = None
    """A file of its own with held-out rows, in the same format and with the same columns.
    evalFraction then has no effect."""

    @property
    def splits(self) -> bool:
        """Whether held-out rows are taken from the dataset itself."""
        return self.eval_source is None and self.eval_fraction > 0


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


class EarlyStopping(Base):
    """When to stop before all epochs are trained."""

    patience: Annotated[int, Field(ge=1, le=1000)] = 2
    """Evaluations in a row without a better loss after which the training stops."""

    min_delta: Annotated[float, Field(ge=0, le=100)] = 0.0
    """How much lower the loss must be to count as better."""


class Tracker(StrEnum):
    """Experiment trackers, as the Trainer's report_to names them."""

    TENSORBOARD = "tensorboard"
    MLFLOW = "mlflow"
    WANDB = "wandb"


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
    """Examples in one forward pass. Times gradientAccumulationSteps it is the effective batch,
    which decides on the result; how that is split into passes is adapted to the memory."""

    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=4096)] = 4
    """Forward passes per optimizer step; the effective batch is this times batchSize."""

    max_sequence_length: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    """Longest example in tokens; what is longer is cut off at the end, counted in
    dataset-report.json, and fails above dataset.maxTruncatedRows."""

    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of all steps in which the learning rate rises from zero to its peak."""

    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """How the learning rate falls after the warmup (transformers' lr_scheduler_type)."""

    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight decay of AdamW."""

    packing: bool = True
    """Lay the rows of a forward pass end to end instead of padding them to the longest; each row
    still sees only itself, so the result is the same and no time goes into padding."""

    gradient_checkpointing: Literal["auto", "always", "never"] = "auto"
    """Compute activations again in the backward pass instead of keeping them: about a third
    slower, several times less memory. `auto` does so where memory is short."""

    min_sequence_length: Annotated[int, Field(ge=16)] | None = None
    """How short maxSequenceLength may be made when GPU memory runs out in spite of one example a
    pass and gradient checkpointing. Left out, the job fails instead, with a remedy."""

    eval_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Optimizer steps between two evaluations on the held-out rows. Left out, there is one before
    the training and one after every epoch."""

    early_stopping: EarlyStopping | None = None
    """Stop when the loss on the held-out rows no longer falls, and keep the best adapter. Left
    out, all epochs are trained."""

    checkpoint_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Optimizer steps between two checkpoints in the object store, from which an interrupted
    training goes on. Left out, there is one about every ten minutes."""

    engine: Literal["auto", "transformers", "unsloth"] = "auto"
    """`unsloth` is faster on one NVIDIA GPU and takes less memory; `transformers` runs everywhere.
    `auto` takes Unsloth where it can run, and says in status why where it can't."""

    parallelism: Literal["auto", "ddp", "fsdp"] = "auto"
    """With several GPUs in the pod: `ddp` keeps the whole model on each, `fsdp` spreads it over
    all. `auto` takes ddp where the model fits one GPU."""

    gpu_memory: Annotated[str, Field(pattern=r"^[1-9][0-9]*(Mi|Gi)$")] | None = None
    """Memory of one GPU, e.g. `24Gi`, so that it is known before a GPU is asked for whether the
    training fits. Left out, the label nvidia.com/gpu.memory of the cluster's nodes tells, where
    the operator may read it."""

    report_to: Annotated[
        tuple[Tracker, ...],
        Field(max_length=3, json_schema_extra={"x-kubernetes-list-type": "set"}),
    ] = ()
    """Experiment trackers, by the Trainer's names: tensorboard (written beside the adapter),
    mlflow, wandb. Set their variables (MLFLOW_TRACKING_URI, WANDB_API_KEY …) in
    stages.train.env."""

    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 42
    """Seed of the adapter's initial weights, the order of the rows, dropout, and of the choice of
    held-out rows."""

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


class TrainingPlan(Base):
    """How `prepare` fits the training into the memory that is there. It never changes the effective
    batch, so it is no part of a fingerprint."""

    batch_size: int
    """Examples in one forward pass on one device."""

    gradient_accumulation_steps: int
    """Forward passes per optimizer step on each device."""

    gradient_checkpointing: bool
    """Whether activations are computed again in the backward pass."""

    parallelism: Literal["none", "ddp", "fsdp"] = "none"
    """How several devices share the work."""

    device_bytes: int | None = None
    """Predicted peak of a GPU's memory, or of the process on a CPU."""


class Hardware(Base):
    """What the training's pod will have, as far as the operator knows; `prepare` plans with it."""

    gpus: int = 0
    """GPUs of the pod."""

    gpu_memory_bytes: int | None = None
    """Memory of one GPU."""

    memory_bytes: int | None = None
    """Memory limit of the pod."""

    ephemeral_storage_bytes: int | None = None
    """Limit of the pod's ephemeral storage."""


class Resolved(Base):
    """What `prepare` found out and the later stages rely on."""

    fingerprints: Fingerprints
    dataset_etag: Annotated[str, Field(alias="datasetETag")]
    """ETag of the dataset's object, or sha256:… of a local file."""

    dataset_rows: int
    """Examples that will be trained on."""

    eval_rows: int = 0
    """Examples that are held out."""

    plan: TrainingPlan | None = None
    """How the training is split into passes; None when nothing is known of the hardware."""

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
    hardware: Hardware | None = None
    """Absent on one machine without Kubernetes, where the machine itself tells."""

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
