"""plan: what a FineTuneJob would do, before it does it."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from finetune_cli import estimate, rows
from finetune_cli.cluster import Cluster
from finetune_cli.commands.results import UNITS, Endpoint, flat, word
from finetune_cli.documents import Document, check_namespaces, read_jobs
from finetune_cli.exits import CliError, ExitCode
from finetune_cli.job import STAGES, Job
from finetune_cli.options import Files, Output
from finetune_cli.output import Form, note, show_object

NEW = "runs: nothing of it is there yet"


def plan(
    files: Files,
    *,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Of one GPU, e.g. 24Gi; default: training.gpuMemory.")
    ] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=1, help="Speed of the training, for its time.")
    ] = None,
    price: Annotated[
        float | None, typer.Option("--price-per-gpu-hour", min=0, help="For the cost.")
    ] = None,
    endpoint: Endpoint = None,
    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", help="Default: the context's.")
    ] = None,
    context: Annotated[str | None, typer.Option(help="Context of the kubeconfig.")] = None,
    kubeconfig: Annotated[str | None, typer.Option(help="File; default: KUBECONFIG.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Ask no cluster.")] = False,
    output: Output = Form.TABLE,
) -> None:
    """Say what would run and why, its memory, disk, time, price.

    Three rows are shown as the model will learn them, where the dataset can be read from here.
    """
    if gpu_memory is not None:
        estimate.check_quantity(gpu_memory)
    told = []
    jobs = read_jobs(files)
    check_namespaces(jobs, namespace)
    for each in jobs:
        problems = each.problems()
        if problems:
            for problem in problems:
                note(problem)
            raise CliError(ExitCode.USAGE, f"{len(problems)} to mend; there is no plan.")
        job = None if offline else _live(each, kubeconfig, context, namespace)
        needs = estimate.needs(
            each.spec(),
            job,
            gpu_memory=gpu_memory,
            tokens_per_second=tokens_per_second,
            price=price,
            endpoint=endpoint,
        )
        told.append(
            {
                "job": each.name,
                "stages": stages(each, job),
                "needs": needs,
                "rows": rows.first_rows(each.spec(), endpoint),
            }
        )
    if output in (Form.JSON, Form.YAML):
        show_object(told if len(told) > 1 else told[0], output)
        return
    for one in told:
        _print(one)


def _print(plan: dict[str, Any]) -> None:
    typer.echo(plan["job"])
    for part in ("stages", "needs"):
        for name, text in plan[part].items():
            typer.echo(f"  {name + ':':<16} {text}")
    for line in plan["rows"]:
        typer.echo(f"  {line}")


def _live(
    document: Document, kubeconfig: str | None, context: str | None, namespace: str | None
) -> Job | None:
    """The job as it is in the cluster, where there is one."""
    try:
        cluster = Cluster.connect(kubeconfig, context, namespace)
        meta = document.body["metadata"]
        there = replace(cluster, namespace=meta.get("namespace") or cluster.namespace)
        return Job(there.job(document.name))
    except CliError as error:
        if error.code is not ExitCode.NOT_FOUND:
            note(f"note: not compared with a cluster: {error.message}")
        return None


def stages(document: Document, job: Job | None) -> dict[str, str]:
    """Of each stage, whether it would run, and why. A changed dataset or model is not seen here."""
    from finetune_operator.api.finetunejob import FineTuneJobSpec
    from finetune_trainer.contract import read_known

    if job is None:
        return dict.fromkeys(STAGES, NEW)
    before = read_known(FineTuneJobSpec, job.spec).value
    after = document.spec()
    changed = [each for each in _changes(before, after) if not each.startswith("output.")]
    old, new = _prints(before), _prints(after)
    differs = {stage: old[stage] != new[stage] for stage in STAGES}
    touched = before.inputs_digest != after.inputs_digest
    found = {"prepare": f"looks again: {', '.join(changed)}" if touched else "has nothing to do"}
    undone = [stage for stage in STAGES if job.stages.get(stage, {}).get("state") != "Succeeded"]
    if "prepare" in undone and not touched:
        found["prepare"] = "runs: it is not done yet"
    for stage in ("train", "export"):
        if differs[stage]:
            found[stage] = f"runs: {', '.join(changed)}"
        elif stage in undone:
            found[stage] = "runs: it is not done yet"
        elif differs["prepare"]:
            found[stage] = "cached, unless the examples come out as others"
        else:
            found[stage] = "cached"
    return found


def _prints(spec: Any) -> dict[str, str]:
    """The fingerprints that a spec has with the same examples and the same model."""
    from finetune_trainer import contract

    config = spec.run_config(contract.JobReference(name="", namespace=""), None)
    same = contract.ExampleContents(examples="", held_out=None, cut=True, longest=2**31)
    prepare = contract.prepare_fingerprint(config, "", "")
    return contract.later_fingerprints(config, prepare, same, "").model_dump(mode="json")


def _changes(before: Any, after: Any) -> list[str]:
    """The fields that differ, as `training.epochs: 3 → 5`."""
    sides = [
        flat({part: each.model_dump(mode="json", by_alias=True)[part] for part in UNITS})
        for each in (before, after)
    ]
    keys = dict.fromkeys([*sides[0], *sides[1]])
    return [
        f"{key}: {word(sides[0].get(key))} → {word(sides[1].get(key))}"
        for key in keys
        if sides[0].get(key) != sides[1].get(key)
    ]
