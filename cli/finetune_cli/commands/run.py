"""run: a FineTuneJob of a file on this machine, by the trainer that is installed here."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from finetune_cli.documents import Document, read_jobs
from finetune_cli.exits import CliError, ExitCode
from finetune_cli.options import Files
from finetune_cli.output import note

PROGRAM = "finetune-trainer"
INSTALL = "pip install 'finetune-operator[cli,trainer,gguf]'"


def run(
    files: Files,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder of the results; default: ./NAME.")
    ] = None,
) -> None:
    """Run the same file on this machine: prepare, train, export.

    Results go to a folder here in place of spec.output, and are pushed nowhere. What that folder
    already holds is not done again. Secrets of the spec are the variables of the same names.
    """
    jobs = read_jobs(files)
    if len(jobs) > 1:
        raise CliError(ExitCode.USAGE, f"one job at a time runs here, and these are {len(jobs)}.")
    problems = jobs[0].problems()
    if problems:
        for each in problems:
            note(each)
        raise CliError(ExitCode.USAGE, f"{len(problems)} to mend; nothing was started.")
    program = shutil.which(PROGRAM)
    if program is None:
        raise CliError(ExitCode.FAILED, f"the trainer is not installed here: {INSTALL}")
    folder = (output or Path(jobs[0].name)).absolute()
    workspace = folder.with_name(f".{folder.name}.workspace")
    workspace.mkdir(parents=True, exist_ok=True)
    config = workspace / "run.json"
    config.write_text(run_json(jobs[0], folder), encoding="utf-8")
    command = [program, "run", "--config", str(config), "--workspace", str(workspace)]
    code, interrupted = _wait(command)
    if interrupted:
        said = "interrupted; the same command goes on from the last step that was saved."
        raise CliError(ExitCode.INTERRUPTED, said)
    if code:
        said = f"the trainer ended with {code}; its last line above says why."
        raise CliError(ExitCode.FAILED, said)
    _tell(folder)


def _wait(command: list[str]) -> tuple[int, bool]:
    """Run a program to its end; its exit code, and whether Ctrl-C was pressed meanwhile.

    The terminal sends Ctrl-C to the program as well, which then needs time to save.
    """
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        return subprocess.run(command, check=False).returncode, bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def run_json(document: Document, folder: Path) -> str:
    """What the operator would tell the trainer, with a folder of this machine as the output.

    Nothing is signed here: the key is in the cluster.
    """
    from finetune_trainer.contract import JobReference, Output

    config = document.spec().run_config(JobReference(name="", namespace=""), None)
    export = config.export
    if export.signing is not None:
        note("note: nothing is signed here: the key of spec.export.signing is in the cluster.")
        export = export.model_copy(update={"signing": None})
    output = Output(uri=str(folder))
    here = config.model_copy(update={"job": None, "output": output, "export": export})
    return here.model_dump_json(indent=2, exclude_defaults=True)


def _tell(folder: Path) -> None:
    """Where the results are, and what comes next."""
    current = json.loads((folder / "manifest.json").read_bytes())
    there = folder / "versions" / current["version"]
    typer.echo(f"Results: {there}")
    typer.echo(f"Next: open {there / 'report.html'}, or ollama create -f {there / 'Modelfile'}")
