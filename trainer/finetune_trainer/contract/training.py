"""spec.model and spec.training: what is trained, and how."""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from finetune_trainer.contract.base import Base, cel, parse_duration
from finetune_trainer.contract.output import ModelStorage


class TargetModule(StrEnum):
    """Names that most models give their linear layers, as PEFT spells them."""

    Q = "q_proj"
    K = "k_proj"
    V = "v_proj"
    O = "o_proj"  # noqa: E741 - the letter is the layer's name
    GATE = "gate_proj"
    UP = "up_proj"
    DOWN = "down_proj"


ALL_LINEAR = "all-linear"
"""In targetModules: every linear layer, as PEFT has it."""

ModuleName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=128,
        pattern=r"^(all-linear|[A-Za-z_][A-Za-z0-9_]*([.][A-Za-z0-9_]+)*)$",
    ),
]
"""Of a layer in the model: the last part of its name, or several parts with dots between."""

_ALONE = "must be all-linear alone, or names of layers without it"
_PARAMETERS_SAID = "must have dropout 0 and no useDora with targetParameters, as PEFT wants it"


class Lora(Base):
    """The low-rank adapter (PEFT's LoraConfig)."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            "!has(self.targetParameters) || size(self.targetParameters) == 0 || "
            "(self.dropout == 0.0 && !self.useDora)",
            _PARAMETERS_SAID,
        )
    )

    r: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the adapter. Twice the rank is twice the trainable parameters."""

    alpha: Annotated[int, Field(ge=1, le=4096)] = 32
    """Scale of the adapter: its output is multiplied by alpha / r."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the adapter's inputs dropped during training, from 0 up to (not including) 1."""

    target_modules: Annotated[
        tuple[ModuleName, ...],
        Field(
            min_length=1,
            max_length=64,
            json_schema_extra={
                "x-kubernetes-list-type": "set",
                **cel("!('all-linear' in self) || size(self) == 1", _ALONE),
            },
        ),
    ] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Linear layers that get an adapter, by the last parts of their names in the model. The default
    adapts attention only; add gate_proj, up_proj and down_proj to adapt the MLP as well, or give
    `all-linear` alone for every linear layer but the output layer. In models that fuse layers
    (Phi-3, Phi-4) q_proj, k_proj and v_proj stand for qkv_proj, gate_proj and up_proj for
    gate_up_proj. With dots a name means fewer layers, e.g. layers.0.self_attn.q_proj."""

    target_parameters: Annotated[
        tuple[ModuleName, ...],
        Field(max_length=8, json_schema_extra={"x-kubernetes-list-type": "set"}),
    ] = ()
    """Parameters that hold all experts of a layer at once, which get an adapter for each expert, by
    the last parts of their names in the model (PEFT's target_parameters), e.g.
    mlp.experts.gate_up_proj and mlp.experts.down_proj. It needs method lora and dropout 0, and
    llama.cpp can't apply such an adapter alone; the merged files are as usual."""

    modules_to_save: Annotated[
        tuple[ModuleName, ...],
        Field(max_length=2, json_schema_extra={"x-kubernetes-list-type": "set"}),
    ] = ()
    """Modules that are trained as a whole beside the adapter, with all of their weights: the input
    embedding (embed_tokens), the output layer (lm_head), or both. For tokens that the base model
    knows no meaning of, e.g. those of another chat template. It takes 16 bytes a weight, and
    llama.cpp can't apply such an adapter alone; the merged files are as usual."""

    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r (rank-stabilized LoRA), so that large ranks
    learn as they should."""

    use_dora: bool = False
    """Learn a magnitude for each output beside the direction (DoRA): a little better at small
    ranks, slower to train. llama.cpp can't apply such an adapter alone; the merged files are as
    usual."""

    @model_validator(mode="after")
    def _fits_parameters(self) -> Self:
        if self.target_parameters and (self.dropout or self.use_dora):
            raise ValueError(_PARAMETERS_SAID)
        return self

    @field_validator("target_modules")
    @classmethod
    def _all_or_some(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if ALL_LINEAR in names and len(names) > 1:
            raise ValueError(_ALONE)
        return names


MODEL_IMAGE = "oci://"
"""How the source begins of a base model that is a container image."""

MODEL_IMAGE_FOLDER = "/var/lib/finetune/model"
"""Where the operator mounts such an image."""

MODEL_CACHE = "FINETUNE_MODEL_CACHE"
"""The environment variable that names the folder in which base models are kept."""

_FOLDERS = (
    "self.startsWith('s3://') || self.startsWith('/')"
    " || self.matches('^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$')"
)
AdapterSource = Annotated[
    str,
    Field(
        min_length=1,
        max_length=1024,
        json_schema_extra=cel(
            _FOLDERS,
            "must be org/name on the Hugging Face Hub, s3://bucket/folder, "
            "or the absolute path of a mounted folder",
        ),
    ),
]
ModelSource = Annotated[
    str,
    Field(
        min_length=1,
        max_length=1024,
        json_schema_extra=cel(
            f"{_FOLDERS} || self.matches('^oci://[a-z0-9][A-Za-z0-9_.:@/-]+$')",
            "must be org/name on the Hugging Face Hub, s3://bucket/folder, "
            "oci://registry/repository:tag, or the absolute path of a mounted folder",
        ),
    ),
]


class InitFrom(Base):
    """An adapter to go on from, instead of one that changes nothing yet."""

    source: AdapterSource
    """Folder with adapter_config.json and adapter_model.safetensors, or with a version of a job:
    `s3://bucket/models/faq/versions/0123456789ab` (reached by spec.storage), `org/name` on the
    Hugging Face Hub, or the absolute path of a mounted folder. It must be of this base model, and
    spec.training.lora must say what it is: the same r, alpha, useRslora, useDora and
    targetModules."""

    revision: Annotated[str, Field(min_length=1, max_length=256)] = "main"
    """Branch, tag or commit of a Hub repository. What is in the files decides whether the training
    runs again, not their name."""


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


Objective = Literal["sft", "dpo", "orpo", "kto"]

PREFERENCE_RATES: dict[str, float] = {"dpo": 5e-6, "kto": 5e-6, "orpo": 8e-5}
"""Learning rates for a LoRA adapter. That of dpo is in TRL's own command for PEFT, ten times its
rate for all weights; those of kto and orpo are ten times TRL's for all weights (5e-7, 8e-6)."""


class Preference(Base):
    """What the objectives on preferences need beside the other hyperparameters, by TRL's names.
    `sft` reads none of it."""

    beta: Annotated[float, Field(gt=0, le=10)] = 0.1
    """For dpo and kto: how strongly the model is held near its base; higher holds it nearer. For
    orpo: the weight of the odds ratio beside the loss on the chosen answer (the paper's lambda)."""

    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """The loss of dpo: `sigmoid` is that of the DPO paper, `hinge` SLiC's, `ipo` that of the IPO
    paper, whose tau is beta."""

    desirable_weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """For kto: the weight of rows whose label is true. Where the labels are not in balance, weight
    times rows should be about the same for both."""

    undesirable_weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """For kto: the weight of rows whose label is false."""


def _without_default(schema: dict[str, Any]) -> None:
    """The API server must not fill in a value that depends on another field."""
    schema.pop("default", None)


_STALL_SAID = "must be a duration of 1s or more, such as 30m or 1h30m"


ADAPTER_RATE, FULL_RATE = 2e-4, 2e-5
"""Peak learning rates where the spec names none. "LoRA Without Regret" (Thinking Machines, 2025)
found LoRA's best rate to be about ten times that of full fine-tuning; Stanford Alpaca trained all
weights of LLaMA 7B with 2e-5."""

ADAPTER, WHOLE_MODEL = "adapter", "tuned"
"""Folders that a training leaves its result in: an adapter, or a whole model (`full`)."""


def _at_defaults(model: type[Base], path: str) -> str:
    """CEL that holds where no field below `path` has another value than its default."""
    return " && ".join(
        _has_default(f"{path}.{info.alias}", info.get_default(call_default_factory=True))
        for info in model.model_fields.values()
    )


def _has_default(path: str, default: Any) -> str:
    if default is None or default == ():
        return f"!has({path})"
    if isinstance(default, tuple):
        return f"{path} == [{', '.join(repr(str(each)) for each in default)}]"
    return f"{path} == {repr(default).lower()}"


_NO_ADAPTER = "must leave out lora and initFrom with method full, which trains no adapter"
_NO_REFERENCE = (
    "must have objective sft with method full and with initFrom: preferences are learnt against "
    "the base, with the adapter off. To go on from a version, name its merged model in "
    "spec.model.source"
)


class Training(Base):
    """What is learnt from the rows, and the hyperparameters."""

    objective: Objective = "sft"
    """What is learnt: `sft` learns answers. `dpo`, `orpo` and `kto` learn which answers people
    prefer: dpo and orpo from pairs of a chosen and a rejected answer, kto from
    answers with a label, true or false, or from such pairs."""

    preference: Preference = Preference()
    """Hyperparameters of dpo, orpo and kto."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            # The server tries the rule on the empty default of this part as well.
            "!has(self.method) || self.method != 'full' || "
            f"(!has(self.initFrom) && {_at_defaults(Lora, 'self.lora')})",
            _NO_ADAPTER,
            (
                "!has(self.objective) || self.objective == 'sft' || "
                "(!has(self.initFrom) && (!has(self.method) || self.method != 'full'))",
                _NO_REFERENCE,
            ),
        )
    )

    method: Literal["lora", "qlora", "full"] = "lora"
    """`lora` keeps the base model in 16 bit; `qlora` loads it in 4 bit (NF4), which takes about a
    quarter of the memory for the weights and is slower. Both are merged into a 16-bit model. `full`
    trains every weight and no adapter: for small models, since it takes 16 to 18 bytes of memory
    for each parameter."""

    lora: Lora = Lora()
    """Size and place of the adapter; not with method full."""

    init_from: InitFrom | None = None
    """The adapter to go on from, such as that of an earlier version. Left out, the training begins
    with the base model. Not with method full."""

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

    learning_rate: Annotated[float, Field(gt=0, le=1, json_schema_extra=_without_default)] = (
        ADAPTER_RATE
    )
    """Peak learning rate of AdamW, above 0 and up to 1. Left out, it is 2e-4 for sft (2e-5 with
    method full), 5e-6 for dpo and kto, and 8e-5 for orpo. If the loss rises, lower it."""

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
    """Stop when the loss on the held-out rows no longer falls, and keep the best adapter (with
    method full, the best weights). Left out, all epochs are trained."""

    checkpoint_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """How many optimizer steps may be lost, and trained twice, when the training is killed: there
    is a checkpoint for every half of it, and no step begins that many ahead of the newest one in
    the object store. Left out, ten minutes are, and an hour with method full, whose checkpoints
    hold 12 bytes for each parameter."""

    engine: Literal["auto", "transformers", "unsloth"] = "auto"
    """`unsloth` is faster on one NVIDIA GPU and takes less memory; `transformers` runs everywhere.
    `auto` takes Unsloth where it can run (not with method full); the log says why where it
    can't."""

    parallelism: Literal["auto", "ddp", "fsdp"] = "auto"
    """With several GPUs in the pod: `ddp` keeps the whole model on each, `fsdp` spreads it over
    all. `auto` takes ddp where the model fits one GPU."""

    gpu_memory: Annotated[str, Field(pattern=r"^[1-9][0-9]*(Mi|Gi)$")] | None = None
    """Memory of one GPU, e.g. `24Gi`, so that it is known before a GPU is asked for whether the
    training fits. Left out, the label nvidia.com/gpu.memory of the cluster's nodes tells, where
    the operator may read it; without it, the training's pod looks at its own GPU."""

    stall_timeout: Annotated[
        str,
        Field(
            min_length=2,
            max_length=18,
            json_schema_extra=cel(
                "self.matches('^([0-9]{1,5}h)?([0-9]{1,5}m)?([0-9]{1,5}s)?$')"
                " && duration(self) >= duration('1s')",
                _STALL_SAID,
            ),
        ),
    ] = "30m"
    """How long nothing may come from the training (no pass, no step, no evaluation) before it
    counts as hung, e.g. `45m` or `1h30m`; until the first step twice as long. It is then ended
    (Stalled), with the stack of every thread in the log, and the next attempt goes on from its last
    checkpoint."""

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

    @property
    def result_folder(self) -> str:
        """Name of the folder that the training leaves its result in."""
        return WHOLE_MODEL if self.method == "full" else ADAPTER

    @model_validator(mode="before")
    @classmethod
    def _usual_rate(cls, data: Any) -> Any:
        if not isinstance(data, dict) or {"learningRate", "learning_rate"} & data.keys():
            return data
        rate = usual_rate(str(data.get("method")), str(data.get("objective")))
        return data if rate == ADAPTER_RATE else {**data, "learningRate": rate}

    @model_validator(mode="after")
    def _has_no_adapter_in_full(self) -> Self:
        usual = Lora()
        same_layers = set(self.lora.target_modules) == set(usual.target_modules)
        others = self.lora.model_copy(update={"target_modules": usual.target_modules})
        no_adapter = same_layers and others == usual and self.init_from is None
        if self.method == "full" and not no_adapter:
            raise ValueError(_NO_ADAPTER)
        return self

    @model_validator(mode="after")
    def _has_a_reference(self) -> Self:
        of_base = self.method != "full" and self.init_from is None
        if self.objective != "sft" and not of_base:
            raise ValueError(_NO_REFERENCE)
        return self

    @field_validator("epochs")
    @classmethod
    def _epochs_in_range(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 1 <= value <= 1000:
            raise ValueError("must be a whole number from 1 to 1000, or auto")
        return value

    @field_validator("stall_timeout")
    @classmethod
    def _is_long_enough(cls, value: str) -> str:
        try:
            short = parse_duration(value) < timedelta(seconds=1)
        except ValueError:
            short = True
        if short:
            raise ValueError(_STALL_SAID)
        return value


def usual_rate(method: str, objective: str = "sft") -> float:
    """The peak learning rate where the spec names none."""
    return PREFERENCE_RATES.get(objective, FULL_RATE if method == "full" else ADAPTER_RATE)


class Model(Base):
    """The base model to fine-tune."""

    source: ModelSource
    """Where the base model is: `org/name` on the Hugging Face Hub, `s3://bucket/folder`, the
    absolute path of a folder that is mounted into the pods, or `oci://registry/repository:tag`, a
    container image that holds it in its root or in /models and that each node fetches once (an
    image volume: Kubernetes 1.35). It must hold safetensors weights."""

    revision: Annotated[str, Field(min_length=1, max_length=256)] = "main"
    """Branch, tag or commit of a Hub model. It is resolved to a commit, which status.lineage
    names. A moving branch retrains when the spec changes next, never by itself, and only where
    files that are used have changed."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave it off unless you have read that code."""

    storage: ModelStorage | None = None
    """How to reach the object store of source, where it is another than the one of spec.storage.
    Nothing of spec.storage holds for it then."""


def display_name(source: str) -> str:
    """The model's short name, for file names: the last part of its source."""
    name = PurePosixPath(source.removeprefix("s3://").rstrip("/")).name
    if source.startswith(MODEL_IMAGE):
        name = name.partition("@")[0].partition(":")[0]
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name) or "model"


def is_mounted(source: str) -> bool:
    """Whether a base model lies on a volume, so that nothing of it is fetched."""
    return source.startswith(("/", MODEL_IMAGE))
