"""finetune-trainer: the stages that the operator runs, and the same on one machine without it."""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from pydantic import ValidationError

from finetune_trainer import local
from finetune_trainer.contract import (
    Reason,
    RunConfig,
    Stage,
    StageError,
    StageResult,
    Tolerated,
    read_run_config,
)
from finetune_trainer.local.fields import without_cluster
from finetune_trainer.memory.machine import describe_machine
from finetune_trainer.runtime.lifecycle import (
    FORMAT_VARIABLE,
    LogFormat,
    explain,
    set_up_libraries,
    trust_given_authorities,
)
from finetune_trainer.runtime.reporter import Reporter, reporter_for
from finetune_trainer.stage_runner import (
    as_result,
    guarded,
    perform,
    stop_on_signal,
    write_termination_message,
)

TERMINATION_LOG = Path("/dev/termination-log")
MOUNTED_WORKSPACE = Path("/workspace")
MOUNTED_CONFIG = Path("/etc/finetune/run.json")

log = logging.getLogger(__name__)

app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
app.add_typer(local.app, name="local")

ConfigOption = Annotated[
    Path, typer.Option("--config", help="The run.json, as the operator writes it.")
]
WorkspaceOption = Annotated[
    Path | None,
    typer.Option(
        "--workspace",
        help="Folder for intermediate files; default /workspace where it is, else ./.workspace.",
    ),
]
TerminationOption = Annotated[
    Path | None,
    typer.Option(
        "--termination-log", help=f"File for the result; default {TERMINATION_LOG} where it is."
    ),
]


@app.callback()
def options(
    log_format: Annotated[
        LogFormat | None,
        typer.Option(help=f"Lines for people or JSON lines; default: {FORMAT_VARIABLE}, or human."),
    ] = None,
) -> None:
    """Set what holds for every command."""
    if log_format:
        os.environ[FORMAT_VARIABLE] = log_format.value


@app.command()
def prepare(
    config: ConfigOption = MOUNTED_CONFIG,
    workspace: WorkspaceOption = None,
    termination_log: TerminationOption = None,
) -> None:
    """Check dataset, base model and access; write the examples."""
    _run_stages([Stage.PREPARE], config, workspace, termination_log)


@app.command()
def train(
    config: ConfigOption = MOUNTED_CONFIG,
    workspace: WorkspaceOption = None,
    termination_log: TerminationOption = None,
) -> None:
    """Train the adapter on the examples that `prepare` wrote."""
    _run_stages([Stage.TRAIN], config, workspace, termination_log)


@app.command()
def export(
    config: ConfigOption = MOUNTED_CONFIG,
    workspace: WorkspaceOption = None,
    termination_log: TerminationOption = None,
) -> None:
    """Merge, convert to GGUF, quantize, check, publish."""
    _run_stages([Stage.EXPORT], config, workspace, termination_log)


@app.command()
def run(
    config: ConfigOption = MOUNTED_CONFIG,
    workspace: WorkspaceOption = None,
    termination_log: TerminationOption = None,
) -> None:
    """Run all three stages here; what the output folder already holds is not done again."""
    _run_stages(list(Stage), config, workspace, termination_log)


@app.command()
def doctor(workspace: WorkspaceOption = None) -> None:
    """Say what a training finds here: GPUs, driver, torch, memory, disk, and what is wrong."""
    for line in describe_machine((workspace or _default_workspace()).absolute()):
        typer.echo(line)


def _run_stages(
    stages: list[Stage], config_file: Path, workspace: Path | None, termination_log: Path | None
) -> None:
    set_up_libraries()
    if termination_log is None and TERMINATION_LOG.exists():
        termination_log = TERMINATION_LOG
    if workspace is None:
        workspace = _default_workspace()
    workspace = workspace.absolute()
    current = [stages[0]]

    read = _read(config_file, workspace)
    if isinstance(read, StageError):
        log.error("%s: %s", read.reason, read.message)
        _finish(as_result(stages[0], read), termination_log)
    ignored = _say_what_is_ignored(read)
    config = read.value
    if config.job is None:  # by hand, or by `finetune run`
        local.log_in_words(without_cluster)
    reporter = reporter_for(config.job)
    stop_on_signal(lambda: current[0], termination_log, reporter)
    with reporter:
        result = _chain(stages, current, config, workspace, reporter)
    result = result.model_copy(update={"message": result.message + ignored})
    if sys.stdout.isatty():
        local.show_quality(result.artifacts)
    _finish(result, termination_log)


def _default_workspace() -> Path:
    return MOUNTED_WORKSPACE if MOUNTED_WORKSPACE.is_dir() else Path(".workspace")


def _chain(
    stages: list[Stage],
    current: list[Stage],
    config: RunConfig,
    workspace: Path,
    reporter: Reporter,
) -> StageResult:
    """Run stages one after the other; the first that fails ends it."""
    held: tuple[Stage, ...] = ()
    for stage in stages:
        if stage in held:
            continue
        current[0] = stage
        result = guarded(stage, partial(perform, stage, config, workspace, reporter))
        if result.reason is not Reason.SUCCEEDED:
            break
        if stage is Stage.PREPARE:
            held = result.complete
            config = config.model_copy(update={"resolved": result.resolved})
    return result


def _say_what_is_ignored(read: Tolerated[RunConfig]) -> str:
    """Warn of fields from a newer operator; return what to add to the result's message."""
    if not read.unknown:
        return ""
    words = f"this trainer image is older than the operator and ignores {', '.join(read.unknown)}"
    log.warning("run.json: %s", words)
    return f" ({words})"


def _read(path: Path, workspace: Path) -> Tolerated[RunConfig] | StageError:
    """Read run.json, and what has to be there before the first connection."""
    try:
        trust_given_authorities(workspace)
        return read_run_config(path)
    except StageError as error:
        return error
    except ValidationError as error:
        return explain(error)
    except OSError as error:
        return StageError(
            Reason.INVALID_CONFIG, f"{path} can't be read: {error.strerror}; name it with --config."
        )


def _finish(result: StageResult, termination_log: Path | None) -> NoReturn:
    write_termination_message(result, termination_log)
    sys.exit(result.reason.exit_code)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
