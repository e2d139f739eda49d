"""The commands and their options; each option is described by the field that it sets."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from finetune_trainer.contract import (
    Columns,
    Dataset,
    Export,
    Lora,
    Model,
    Quantization,
    RunConfig,
    Stage,
    StageResult,
    TargetModule,
    Training,
)
from finetune_trainer.local import steps
from finetune_trainer.local.quality_table import show_quality
from finetune_trainer.runtime.logs import set_up_libraries
from finetune_trainer.runtime.progress import Reporter
from finetune_trainer.stage_runner import guarded, stop_on_signal

app = typer.Typer(help="Train, merge and convert on one machine.", no_args_is_help=True)

TRAINING = Training()
LORA = Lora()
TARGET_MODULES = list(LORA.target_modules)
QUANTIZATIONS = list(Export().gguf)
COLUMNS = Columns()
EVAL_FRACTION: float = Dataset.model_fields["eval_fraction"].default


def about(model: type[BaseModel], name: str) -> Any:
    """An option that is described where the field of run.json is."""
    return typer.Option(help=" ".join((model.model_fields[name].description or "").split()))


OutputOption = Annotated[Path, typer.Option(help="Folder for the results.")]
DEFAULT_OUTPUT = Path("models")


@app.command()
def train(  # noqa: PLR0917 - options, which nobody passes by position
    dataset: Annotated[
        Path | None,
        typer.Option(help="CSV, JSON lines or Parquet; default: the sample."),
    ] = None,
    eval_dataset: Annotated[Path | None, about(Dataset, "eval_source")] = None,
    eval_fraction: Annotated[float, about(Dataset, "eval_fraction")] = EVAL_FRACTION,
    system_prompt: Annotated[str | None, about(Dataset, "system_prompt")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="org/name or a folder; default: the sample's small model.")
    ] = None,
    output: OutputOption = DEFAULT_OUTPUT,
    revision: Annotated[str, about(Model, "revision")] = "main",
    trust_remote_code: Annotated[bool, about(Model, "trust_remote_code")] = False,
    instruction_column: Annotated[str, about(Columns, "instruction")] = COLUMNS.instruction,
    response_column: Annotated[str, about(Columns, "response")] = COLUMNS.response,
    method: Annotated[str, about(Training, "method")] = TRAINING.method,
    lora_r: Annotated[int, about(Lora, "r")] = LORA.r,
    lora_alpha: Annotated[int, about(Lora, "alpha")] = LORA.alpha,
    lora_dropout: Annotated[float, about(Lora, "dropout")] = LORA.dropout,
    target_modules: Annotated[list[TargetModule], about(Lora, "target_modules")] = (TARGET_MODULES),
    epochs: Annotated[str, about(Training, "epochs")] = str(TRAINING.epochs),
    learning_rate: Annotated[float, about(Training, "learning_rate")] = TRAINING.learning_rate,
    batch_size: Annotated[int, about(Training, "batch_size")] = TRAINING.batch_size,
    gradient_accumulation_steps: Annotated[
        int, about(Training, "gradient_accumulation_steps")
    ] = TRAINING.gradient_accumulation_steps,
    max_sequence_length: Annotated[
        int, about(Training, "max_sequence_length")
    ] = TRAINING.max_sequence_length,
    warmup_ratio: Annotated[float, about(Training, "warmup_ratio")] = TRAINING.warmup_ratio,
    scheduler: Annotated[str, about(Training, "scheduler")] = TRAINING.scheduler,
    weight_decay: Annotated[float, about(Training, "weight_decay")] = TRAINING.weight_decay,
    seed: Annotated[int, about(Training, "seed")] = TRAINING.seed,
    logging_steps: Annotated[int, about(Training, "logging_steps")] = TRAINING.logging_steps,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any other field of run.json, e.g. dataset.onInvalidRow=skip (repeatable).",
        ),
    ] = None,
) -> None:
    """Fine-tune: leaves OUTPUT/lora_adapter."""
    training = {
        "method": method,
        "lora": {
            "r": lora_r,
            "alpha": lora_alpha,
            "dropout": lora_dropout,
            "target_modules": target_modules,
        },
        "epochs": int(epochs) if epochs.isdecimal() else epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "max_sequence_length": max_sequence_length,
        "warmup_ratio": warmup_ratio,
        "scheduler": scheduler,
        "weight_decay": weight_decay,
        "seed": seed,
        "logging_steps": logging_steps,
    }
    folder = output.resolve()

    def work(reporter: Reporter) -> StageResult:
        held_out = steps.eval_dataset(eval_dataset, dataset)
        fields = {
            "model": {
                "source": steps.base_model(base_model),
                "revision": revision,
                "trust_remote_code": trust_remote_code,
            },
            "dataset": {
                "source": str(steps.dataset(dataset)),
                "columns": {"instruction": instruction_column, "response": response_column},
                "eval_source": None if held_out is None else str(held_out),
                "eval_fraction": eval_fraction,
                "system_prompt": system_prompt,
            },
            "training": training,
            "export": {"merged": False, "gguf": []},
            "output": {"uri": str(steps.store_folder(folder))},
        }
        given = steps.with_settings(fields, settings or [])
        return steps.train(RunConfig.model_validate(given), folder, reporter)

    _finish(Stage.TRAIN, work)


@app.command()
def merge(output: OutputOption = DEFAULT_OUTPUT) -> None:
    """Merge the adapter into its base model: leaves OUTPUT/merged."""
    _finish(Stage.EXPORT, lambda reporter: steps.merge(output.resolve(), reporter))


@app.command()
def gguf(
    output: OutputOption = DEFAULT_OUTPUT,
    quantizations: Annotated[list[Quantization], about(Export, "gguf")] = QUANTIZATIONS,
) -> None:
    """Convert the merged model to GGUF files, and measure each: leaves OUTPUT/gguf."""
    kinds = tuple(quantizations)
    _finish(Stage.EXPORT, lambda reporter: steps.gguf(output.resolve(), kinds, reporter))


def _finish(stage: Stage, work: Callable[[Reporter], StageResult]) -> None:
    set_up_libraries()
    with Reporter() as reporter:
        stop_on_signal(lambda: stage, None, reporter)
        result = guarded(stage, lambda: work(reporter))
    show_quality(result.artifacts)
    sys.exit(result.reason.exit_code)
