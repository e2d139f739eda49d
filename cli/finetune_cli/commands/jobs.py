"""list, suspend, resume, retry, rollback: FineTuneJobs in the cluster."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from finetune_cli.cluster import Cluster, JsonObject
from finetune_cli.commands.watch import follow
from finetune_cli.exits import CliError, ExitCode
from finetune_cli.job import Job, listed
from finetune_cli.options import Name, Output, on_cluster
from finetune_cli.output import Column, Form, age, note, show_object, show_table

COLUMNS = (
    Column("NAME", 9),
    Column("PHASE", 9),
    Column("REASON", 7),
    Column("STAGE", 4),
    Column("PROGRESS", 8, right=True),
    Column("LOSS", 5, right=True),
    Column("ETA", 6, right=True),
    Column("VERSION", 3),
    Column("AGE", 7, right=True),
)
WIDE = (
    Column("EVAL LOSS", 2, right=True),
    Column("GPU HOURS", 2, right=True),
    Column("MODEL", 1),
    Column("OUTPUT", 0),
)

Watch = Annotated[bool, typer.Option("--watch", "-w", help="Then watch it to its end.")]


@on_cluster
def list_jobs(
    cluster: Cluster,
    everywhere: Annotated[
        bool, typer.Option("--all-namespaces", "-A", help="Those of all namespaces.")
    ] = False,
    selector: Annotated[
        str | None, typer.Option("--selector", "-l", help="Labels, e.g. team=support.")
    ] = None,
    output: Output = Form.TABLE,
) -> None:
    """List FineTuneJobs: phase, progress, loss, time left."""
    found = [Job(each) for each in cluster.jobs(everywhere=everywhere, selector=selector)]
    if output in (Form.JSON, Form.YAML):
        items = [each.tidy for each in found]
        show_object({"apiVersion": "v1", "kind": "List", "items": items}, output)
    elif output is Form.NAME:
        for each in found:
            typer.echo(f"finetunejob.finetune.dev/{each.name}")
    elif not found:
        where = "any namespace" if everywhere else f"namespace {cluster.namespace}"
        note(f"No FineTuneJob in {where}. `finetune init` writes the first one.")
    else:
        wide = output is Form.WIDE
        before = (Column("NAMESPACE", 9),) if everywhere else ()
        rows = [([each.namespace] if everywhere else []) + _row(each, wide) for each in found]
        show_table((*before, *COLUMNS, *(WIDE if wide else ())), rows)


def _row(job: Job, wide: bool) -> list[str]:
    progress, status = job.progress, job.status
    at_work = job.phase not in ("Succeeded", "Failed", "Suspended")
    row = [
        job.name,
        job.phase,
        str(status.get("reason") or ""),
        str(status.get("stage") or ""),
        str(progress.get("percent") or "") if at_work else "",
        _figure(progress.get("loss")),
        str(progress.get("eta") or "") if at_work else "",
        str(status.get("version") or ""),
        age(job.created),
    ]
    if not wide:
        return row
    seconds = (status.get("usage") or {}).get("gpuSeconds")
    return [
        *row,
        _figure((status.get("metrics") or {}).get("evalLoss")),
        f"{seconds / 3600:.1f}" if seconds else "",
        str(job.spec["model"]["source"]),
        str(job.spec["output"]["uri"]),
    ]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


@on_cluster
def suspend(cluster: Cluster, name: Name) -> None:
    """Stop a job's pods; a training saves its last step first."""
    _edit(cluster, name, {"suspend": True})
    typer.echo(f"{name} is being suspended. `finetune resume {name}` goes on from the last step.")


@on_cluster
def resume(cluster: Cluster, name: Name, watch: Watch = False) -> None:
    """Let a suspended job go on from its last step."""
    job = Job(cluster.job(name))
    if not job.spec.get("suspend"):
        typer.echo(f"{name} is not suspended.")
    else:
        _edit(cluster, name, {"suspend": None})
        typer.echo(f"{name} goes on.")
    _follow(cluster, name, watch)


@on_cluster
def retry(cluster: Cluster, name: Name, watch: Watch = False) -> None:
    """Look at data and model again; make anew what changed or failed."""
    from finetune_operator.api import RETRY_ANNOTATION

    job = Job(cluster.job(name))
    if job.spec.get("suspend"):
        raise CliError(
            ExitCode.REFUSED,
            f"{name} is suspended, so that nothing starts: `finetune resume {name}` first.",
        )
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    cluster.patch_job(name, {"metadata": {"annotations": {RETRY_ANNOTATION: now}}})
    typer.echo(f"{name}: dataset and model are looked at again; only what changed is made anew.")
    if watch:
        code = follow(cluster, name)
        raise typer.Exit(code or _look_of(Job(cluster.job(name))))


def _look_of(job: Job) -> ExitCode:
    """How the look of a job that keeps its earlier result ended."""
    if job.condition("Degraded").get("status") != "True":
        return ExitCode.OK
    note(f"error: {job.message or 'dataset and model could not be looked at again.'}")
    return ExitCode.FAILED


@on_cluster
def rollback(
    cluster: Cluster,
    name: Name,
    version: Annotated[
        str | None, typer.Argument(help="As in `watch`; default: the one before the current.")
    ] = None,
    undo: Annotated[
        bool, typer.Option("--undo", help="Back to the version of the spec itself.")
    ] = False,
    watch: Watch = False,
) -> None:
    """Make an earlier version current; nothing is trained again."""
    if undo and version:
        raise CliError(ExitCode.USAGE, "give a version or --undo, not both.")
    job = Job(cluster.job(name))
    if undo:
        _edit(cluster, name, {"rollbackTo": None})
        typer.echo(f"{name} goes back to the version of its spec.")
    else:
        wanted = job.version(version) if version else _before_current(job)
        chosen = str(wanted["version"])
        if wanted.get("state") == "Deleted":
            raise CliError(
                ExitCode.NOT_FOUND,
                f"the store doesn't hold version {chosen} of {name} any more: it has "
                f"{listed(each for each in job.versions if each.get('state') != 'Deleted')}.",
            )
        _edit(cluster, name, {"rollbackTo": chosen})
        typer.echo(f"{name} goes back to {chosen}. `finetune rollback {name} --undo` undoes it.")
    _follow(cluster, name, watch)


def _before_current(job: Job) -> JsonObject:
    """The newest version that can be rolled back to, and is older than the current one."""
    states = [each.get("state") for each in job.versions]
    after = job.versions[states.index("Current") + 1 :] if "Current" in states else job.versions
    for each in after:
        if each.get("state") == "Available":
            return each
    raise CliError(
        ExitCode.NOT_FOUND,
        f"{job.name} has no version before the current one to go back to; `finetune watch "
        f"{job.name} --once` lists its versions.",
    )


def _edit(cluster: Cluster, name: str, spec: JsonObject) -> None:
    """Change fields of the spec; say so where a tool will change them back."""
    job = Job(cluster.patch_job(name, {"spec": spec}))
    if job.gitops:
        field = next(iter(spec))
        note(f"note: {job.gitops} keeps {name} as it is in Git: set spec.{field} there as well.")


def _follow(cluster: Cluster, name: str, watch: bool) -> None:
    if watch:
        raise typer.Exit(follow(cluster, name))
