"""The commands of `finetune-trainer local`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from finetune_trainer.contract import Stage, StageResult
from finetune_trainer.local import steps
from finetune_trainer.local.fields import settable_fields
from finetune_trainer.local.quality_table import show_quality
from finetune_trainer.runtime.logs import set_up_libraries
from finetune_trainer.runtime.progress import Reporter
from finetune_trainer.stage_runner import guarded, stop_on_signal

app = typer.Typer(help="Train, merge and convert on one machine.", no_args_is_help=True)

OutputOption = Annotated[Path, typer.Option(help="Folder for the results.")]
DEFAULT_OUTPUT = Path("models")


@app.command()
def train(
    dataset: Annotated[
        str | None,
        typer.Option(help="CSV, JSON lines or Parquet (dataset.source); default: the sample."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            help="org/name or a folder (model.source); default: the sample's small model."
        ),
    ] = None,
    epochs: Annotated[
        str | None, typer.Option(help="Passes over the data, or auto (training.epochs).")
    ] = None,
    output: OutputOption = DEFAULT_OUTPUT,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="Any field, e.g. training.learningRate=1e-3 or "
            "training.lora.targetModules=q_proj,v_proj (repeatable); "
            "`finetune-trainer local fields` lists them.",
        ),
    ] = None,
) -> None:
    """Fine-tune: leaves OUTPUT/lora_adapter."""
    flags = {"dataset.source": dataset, "model.source": base_model, "training.epochs": epochs}
    given = [f"{path}={value}" for path, value in flags.items() if value is not None]
    given += settings or []
    _finish(Stage.TRAIN, lambda reporter: steps.train(given, output.resolve(), reporter))


@app.command()
def merge(output: OutputOption = DEFAULT_OUTPUT) -> None:
    """Merge the adapter into its base model: leaves OUTPUT/merged."""
    _finish(Stage.EXPORT, lambda reporter: steps.merge(output.resolve(), reporter))


@app.command()
def gguf(
    output: OutputOption = DEFAULT_OUTPUT,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="Any field of export, e.g. export.gguf=Q8_0,Q4_K_M (repeatable).",
        ),
    ] = None,
) -> None:
    """Convert the merged model to GGUF files, and measure each: leaves OUTPUT/gguf."""
    _finish(Stage.EXPORT, lambda reporter: steps.gguf(settings or [], output.resolve(), reporter))


@app.command()
def fields() -> None:
    """List all fields that --set takes, with defaults and what they mean."""
    console = Console(highlight=False, soft_wrap=True)
    for field in settable_fields().values():
        console.print(f"[bold]{field.path}[/]={field.default}", markup=True)
        console.print(f"    {field.description}", markup=False)


def _finish(stage: Stage, work: Callable[[Reporter], StageResult]) -> None:
    set_up_libraries()
    with Reporter() as reporter:
        stop_on_signal(lambda: stage, None, reporter)
        result = guarded(stage, lambda: work(reporter))
    show_quality(result.artifacts)
    sys.exit(result.reason.exit_code)
