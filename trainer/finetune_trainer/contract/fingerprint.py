"""Fingerprints: SHA-256 over what can change a stage's result, and nothing else.

`prepare`'s says which request its examples answer. `train`'s goes by what `prepare` wrote, and not
by how the rows were asked for: another file with the same rows, or a better reader, trains nothing
anew. `export`'s contains `train`'s. Images, resources, names, credentials and logging are left out:
an upgrade retrains nothing.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from finetune_trainer.contract.base import Stage
from finetune_trainer.contract.run import Fingerprints, RunConfig
from finetune_trainer.contract.training import Objective, TargetModule, display_name

RECIPE = {Stage.PREPARE: 2, Stage.TRAIN: 1, Stage.EXPORT: 2}
"""Versions of the stages' code. Raise one by hand when the same inputs would give another result;
everybody's next run with that stage then repeats it."""


def canonical(value: Any) -> bytes:
    """JSON in one spelling only: sorted keys, no spaces, UTF-8, no NaN."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical(value)).hexdigest()


UNCHANGING = {
    "checkpoint_steps",
    "gpu_memory",
    "gradient_checkpointing",
    "logging_steps",
    "packing",
    "parallelism",
    "report_to",
    "stall_timeout",
}
"""Fields of spec.training that decide on how the work is done and not on what comes out. (Packing
is proven on the loaded model before it is used.)"""

_READ_OF_PREFERENCE: dict[Objective, tuple[str, ...]] = {
    "sft": (),
    "dpo": ("beta", "lossType"),
    "orpo": ("beta",),
    "kto": ("beta", "desirableWeight", "undesirableWeight"),
}
"""The fields of spec.training.preference that each objective reads."""

CONDITIONAL = {
    "batch_size",
    "gradient_accumulation_steps",
    "max_sequence_length",
    "min_sequence_length",
    "eval_steps",
    "init_from",
}
"""Fields of spec.training that count only in some cases: see _changing. What initFrom stands for
counts (train_fingerprint)."""


@dataclass(frozen=True)
class ExampleContents:
    """What `prepare` wrote, as far as a training's result depends on it."""

    examples: str
    """SHA-256 of examples.jsonl."""

    held_out: str | None
    """SHA-256 of eval.jsonl; None where no row is held out."""

    cut: bool
    """Whether maxSequenceLength cuts any of them."""

    longest: int
    """Tokens of the longest example, as it is trained on."""

    @property
    def short_digest(self) -> str:
        """The first 12 characters of a digest over all rows."""
        return digest([self.examples, self.held_out])[:12]


def prepare_fingerprint(
    config: RunConfig, dataset_etag: str, model_revision: str, eval_etag: str | None = None
) -> str:
    """The fingerprint of `prepare`: which rows, asked for how, for which tokenizer.

    Fields that have their default are left out: a release that adds a field changes no
    fingerprint, and one that changes a default raises the stage's recipe version.
    """
    return digest(
        {
            "recipe": RECIPE[Stage.PREPARE],
            "dataset": config.dataset.model_dump(
                mode="json", exclude={"storage"}, exclude_defaults=True
            ),
            "datasetETag": dataset_etag,
            "evalETag": eval_etag,
            "splitSeed": config.training.seed if config.dataset.splits else None,
            # A branch name stands for nothing: what it led to does.
            "model": config.model.model_dump(
                mode="json", exclude={"revision", "storage"}, exclude_defaults=True
            ),
            "modelRevision": model_revision,
            "maxSequenceLength": config.training.max_sequence_length,
            **({} if config.training.objective == "sft" else _objective(config)),
        }
    )


def _objective(config: RunConfig) -> dict[str, Any]:
    """It decides which columns are read."""
    return {"objective": config.training.objective}


def train_fingerprint(
    config: RunConfig,
    contents: ExampleContents,
    model_revision: str,
    init_revision: str | None = None,
) -> str:
    """The fingerprint of `train`: examples, base model, first adapter and hyperparameters."""
    return digest(
        {
            **({"initFrom": init_revision} if init_revision else {}),
            "recipe": RECIPE[Stage.TRAIN],
            "examples": contents.examples,
            "heldOut": contents.held_out,
            "modelRevision": model_revision,
            "trustRemoteCode": config.model.trust_remote_code,
            "training": _changing(config, contents),
        }
    )


def export_fingerprint(config: RunConfig, train: str) -> str:
    """The fingerprint of `export`: the adapter, and what is to be made of it.

    What report and card say of the dataset is no part of it. They keep naming the file that was
    trained on, where another one has the same rows.
    """
    export = config.export
    limits = [each.model_dump(mode="json") for each in export.quality_limits]
    return digest(
        {
            "recipe": RECIPE[Stage.EXPORT],
            "train": train,
            # The names of GGUF files, and what the Modelfile says.
            "name": display_name(config.model.source),
            "systemPrompt": config.dataset.system_prompt,
            "maxSequenceLength": config.training.max_sequence_length,
            "merged": export.merged,
            "gguf": sorted(export.gguf),
            "qualityLimits": sorted(limits, key=canonical),
            **export.model_dump(
                mode="json", exclude={"merged", "gguf", "quality_limits"}, exclude_defaults=True
            ),
        }
    )


def later_fingerprints(
    config: RunConfig,
    prepare: str,
    contents: ExampleContents,
    model_revision: str,
    init_revision: str | None = None,
) -> Fingerprints:
    """All three, once the result of `prepare` is known."""
    train = train_fingerprint(config, contents, model_revision, init_revision)
    return Fingerprints(prepare=prepare, train=train, export=export_fingerprint(config, train))


def _changing(config: RunConfig, contents: ExampleContents) -> dict[str, Any]:
    """What of spec.training can change the result, in one spelling; defaults are left out."""
    training = config.training
    given, usual = training.lora.target_modules, list(TargetModule)
    in_order = (*(n.value for n in usual if n in given), *sorted(set(given).difference(usual)))
    lora = training.lora.model_copy(
        update={
            "target_modules": in_order,
            "modules_to_save": tuple(sorted(training.lora.modules_to_save)),
            "target_parameters": tuple(sorted(training.lora.target_parameters)),
        }
    )
    found: dict[str, Any] = training.model_copy(update={"lora": lora}).model_dump(
        mode="json", exclude=UNCHANGING | CONDITIONAL, exclude_defaults=True
    )
    read = _READ_OF_PREFERENCE[training.objective]
    chosen = {k: v for k, v in found.pop("preference", {}).items() if k in read}
    if chosen:
        found["preference"] = chosen
    # How a step is split into passes follows from the memory.
    found["effectiveBatch"] = training.batch_size * training.gradient_accumulation_steps
    if contents.cut:
        found["maxSequenceLength"] = training.max_sequence_length
    if training.early_stopping is not None:
        found["evalSteps"] = training.eval_steps  # the best of these is kept
    shortest = training.min_sequence_length
    if shortest is not None and shortest < contents.longest:
        # How far rows may be shortened when memory runs out, and how many of them.
        found["minSequenceLength"] = shortest
        found["maxTruncatedRows"] = config.dataset.max_truncated_rows
    return found
