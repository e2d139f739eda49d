"""The commands of `finetune`, and how each ends."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from finetune_cli.commands import chat, doctor, files, jobs, logs, plan, results, run, watch
from finetune_cli.exits import CliError, ExitCode

TAKES_A_FILE = ("-f", "--filename", "--kubeconfig", "--download")
HELP = "Fine-tune models on Kubernetes: submit FineTuneJobs, watch them, use what they make."


class Commands(TyperGroup):
    """Turns errors into one line and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - of the base class
        """In the order of use, not of the alphabet."""
        return list(self.commands)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except CliError as error:
            typer.echo(f"error: {error.message}", err=True)
            raise typer.Exit(error.code) from error
        except BrokenPipeError:
            raise
        except OSError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(ExitCode.FAILED) from error
        except KeyboardInterrupt as error:
            typer.echo("", err=True)
            raise typer.Exit(ExitCode.INTERRUPTED) from error


app = typer.Typer(
    help=HELP,
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"finetune {version('finetune-operator')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and end.")
    ] = False,
) -> None:
    """Set what holds for every command."""


for _name, _command in (
    ("init", files.init),
    ("validate", files.validate),
    ("plan", plan.plan),
    ("run", run.run),
    ("submit", files.submit),
    ("list", jobs.list_jobs),
    ("watch", watch.watch),
    ("logs", logs.logs),
    ("report", results.report),
    ("artifacts", results.artifacts),
    ("chat", chat.chat),
    ("compare", results.compare),
    ("suspend", jobs.suspend),
    ("resume", jobs.resume),
    ("retry", jobs.retry),
    ("rollback", jobs.rollback),
    ("doctor", doctor.doctor),
):
    app.command(_name)(_command)


def main() -> None:
    """Run it, under the name that the user called it by."""
    called = Path(sys.argv[0]).name
    app(prog_name="kubectl finetune" if called.startswith("kubectl-") else "finetune")


def complete() -> None:
    """Complete a command line for kubectl, which calls `kubectl_complete-finetune` with its words.

    It wants a candidate a line, and at last what else to do: nothing (:4, Cobra's
    ShellCompDirectiveNoFileComp), or names of files (:0). The words go to typer as bash's do.
    """
    *words, incomplete = sys.argv[1:] or [""]
    line = ["finetune", *words, *([incomplete] if incomplete else [])]
    variables = {"COMP_WORDS": shlex.join(line), "COMP_CWORD": str(len(words) + 1)}
    os.environ |= {**variables, "_FINETUNE_COMPLETE": "complete_bash"}
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as found:
        app(prog_name="finetune")
    for candidate in found.getvalue().split():
        typer.echo(candidate)
    flag, equals, _ = incomplete.partition("=")
    named = flag if equals else (words or [""])[-1]
    typer.echo(":0" if named in TAKES_A_FILE or words == ["init"] else ":4")


if __name__ == "__main__":
    main()
