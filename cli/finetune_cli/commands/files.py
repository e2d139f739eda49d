"""init, validate, submit: FineTuneJobs in files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from finetune_cli.cluster import Cluster, JsonObject
from finetune_cli.commands.watch import follow
from finetune_cli.documents import Document, check_namespaces, read_jobs
from finetune_cli.exits import CliError, ExitCode
from finetune_cli.job import Job
from finetune_cli.options import Files, Output, on_cluster
from finetune_cli.output import Form, note, show_object

DEFAULT_MODEL = "Qwen/Qwen3-0.6B"  # small, open, not gated


def init(
    file: Annotated[Path, typer.Argument(help="The file to write.")] = Path("finetunejob.yaml"),
    *,
    name: Annotated[str | None, typer.Option(help="Name of the job.")] = None,
    model: Annotated[str | None, typer.Option(help="org/name, s3:// or a folder.")] = None,
    dataset: Annotated[str | None, typer.Option(help="CSV, JSON lines, Parquet: s3://….")] = None,
    to: Annotated[str | None, typer.Option(help="Folder of the results: s3://….")] = None,
    secret: Annotated[
        str | None, typer.Option(help="Secret with the bucket's keys; '' with an identity.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs to train on; 0: the CPU.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Write over a file.")] = False,
) -> None:
    """Write the first FineTuneJob: a valid file of at most ten lines."""
    if file.exists() and not force:
        raise CliError(ExitCode.USAGE, f"{file} is there already: --force writes over it.")
    name = _ask(name, "Name of the job", "my-model")
    answers = {
        "model": _ask(model, "Base model", DEFAULT_MODEL),
        "dataset": _ask(dataset, "Dataset", "s3://datasets/my-data.csv"),
        "output": _ask(to, "Folder of the results", f"s3://models/{name}"),
        "secret": _ask(secret, "Secret with the bucket's keys", "object-store"),
    }
    file.write_text(_first_job(name, answers, gpus), encoding="utf-8")
    _fail_if([problem for each in read_jobs([file]) for problem in each.problems()])
    typer.echo(f"Wrote {file}. Next: finetune submit -f {file} --watch")


def _ask(given: str | None, what: str, default: str) -> str:
    """The flag's value; else what a person answers, or the default where nobody is there."""
    if given is not None:
        return given
    return str(typer.prompt(what, default=default)) if sys.stdin.isatty() else default


def _first_job(name: str, answers: dict[str, str], gpus: int) -> str:
    from finetune_operator.api import API_VERSION, KIND

    spec: JsonObject = {
        "model": {"source": answers["model"]},
        "dataset": {"source": answers["dataset"]},
        "output": {"uri": answers["output"]},
    }
    if answers["secret"]:
        spec["storage"] = {"secretRef": {"name": answers["secret"]}}
    if gpus:
        spec["stages"] = {"train": {"resources": {"limits": {"nvidia.com/gpu": gpus}}}}
    head = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}}
    lines = [*_line_each(head), "spec:", *(f"  {line}" for line in _line_each(spec))]
    return "\n".join(lines) + "\n"


def _line_each(fields: JsonObject) -> list[str]:
    """One line of YAML for each field, however deep its value is."""
    import yaml

    mappings: list[str] = [
        yaml.safe_dump({key: value}, allow_unicode=True, default_flow_style=True, width=10_000)
        for key, value in fields.items()
    ]
    return [text.strip()[1:-1] for text in mappings]  # without the braces


def validate(
    files: Files,
    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", help="Default: the context's.")
    ] = None,
    context: Annotated[str | None, typer.Option(help="Context of the kubeconfig.")] = None,
    kubeconfig: Annotated[str | None, typer.Option(help="File; default: KUBECONFIG.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Ask no cluster.")] = False,
) -> None:
    """Check files: here, and by a dry run of the cluster.

    Fields and rules are checked here; --offline asks no cluster.
    """
    jobs = read_jobs(files)
    check_namespaces(jobs, namespace)
    _fail_if([problem for each in jobs for problem in each.problems()])
    asked = "" if offline else _dry_run(jobs, kubeconfig, context, namespace)
    for each in jobs:
        typer.echo(f"{each.place()}: {each.name} is valid{asked}.")


def _dry_run(
    jobs: list[Document], kubeconfig: str | None, context: str | None, namespace: str | None
) -> str:
    """Ask the API server, where there is one; what to add to the verdict."""
    problems = []
    try:
        cluster = Cluster.connect(kubeconfig, context, namespace)
        for each in jobs:
            if said := _refusal(cluster, each):
                problems.append(f"{each.place()}: {said}")
    except CliError as error:
        note(f"note: not checked by a cluster: {error.message}")
        return ""
    _fail_if(problems)
    return f" (context {cluster.context} too)"


def _refusal(cluster: Cluster, document: Document) -> str:
    """What the API server says against a job; raises CliError where it can't be asked."""
    try:
        cluster.apply_job(document.body, dry_run=True)
    except CliError as error:
        if error.code in (ExitCode.USAGE, ExitCode.FAILED):
            return error.message
        if "conflict" not in error.message:
            raise
        note(f"note: {error.message}")
    return ""


@on_cluster
def submit(
    cluster: Cluster,
    files: Files,
    force: Annotated[
        bool, typer.Option("--force-conflicts", help="Take over fields of other tools.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Then watch it to its end.")] = False,
    output: Output = Form.TABLE,
) -> None:
    """Create or change the FineTuneJobs of files (server-side apply)."""
    jobs = read_jobs(files)
    check_namespaces(jobs, cluster.namespace if cluster.named else None)
    _fail_if([problem for each in jobs for problem in each.problems()])
    if watch and len(jobs) > 1:
        raise CliError(ExitCode.USAGE, f"--watch follows one job, and these are {len(jobs)}.")
    for each in jobs:
        before = _live(cluster, each)
        job = Job(cluster.apply_job(each.body, force=force))
        if output in (Form.JSON, Form.YAML):
            show_object(job.tidy, output)
        elif output is Form.NAME:
            typer.echo(f"finetunejob.finetune.dev/{job.name}")
        else:
            done = "changed" if before is None or _set(before) != _set(job) else "unchanged"
            done = "created" if before is None else done
            typer.echo(f"{job.namespace}/{job.name} {done}")
    if watch:
        from dataclasses import replace

        raise typer.Exit(follow(replace(cluster, namespace=job.namespace), job.name, output=output))


def _set(job: Job) -> tuple[object, ...]:
    """What a file can change; resourceVersion also changes with the status."""
    meta = job.raw["metadata"]
    return tuple(meta.get(key) for key in ("generation", "labels", "annotations"))


def _live(cluster: Cluster, document: Document) -> Job | None:
    """The job that is there, if there is one."""
    from dataclasses import replace

    meta = document.body["metadata"]
    try:
        there = replace(cluster, namespace=meta.get("namespace") or cluster.namespace)
        return Job(there.job(meta["name"]))
    except CliError as error:
        if error.code is ExitCode.NOT_FOUND:
            return None
        raise


def _fail_if(problems: list[str]) -> None:
    if problems:
        for each in problems:
            note(each)
        raise CliError(ExitCode.USAGE, f"{len(problems)} to mend; nothing was sent.")
