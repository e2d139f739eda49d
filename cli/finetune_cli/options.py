"""kubectl's options, for each command that needs a cluster, and completion of names."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune_cli.cluster import Cluster
from finetune_cli.exits import CliError
from finetune_cli.output import Form

NAMESPACE, CONTEXT, KUBECONFIG = "namespace", "context", "kubeconfig"
_COMMON: dict[str, Any] = {
    NAMESPACE: Annotated[
        str | None, typer.Option("--namespace", "-n", help="Default: the context's.")
    ],
    CONTEXT: Annotated[str | None, typer.Option(help="Context of the kubeconfig.")],
    KUBECONFIG: Annotated[str | None, typer.Option(help="File; default: KUBECONFIG.")],
}


def on_cluster(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command kubectl's options, and the cluster that they name as its first value."""

    @functools.wraps(command)
    def run(**values: Any) -> None:
        namespace, context, kubeconfig = (values.pop(name) for name in _COMMON)
        command(Cluster.connect(kubeconfig, context, namespace), **values)

    own = [*inspect.signature(command, eval_str=True).parameters.values()][1:]
    common = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in _COMMON.items()
    ]
    named = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in own]
    # Typer reads both.
    run.__signature__ = inspect.Signature([*named, *common])  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in (*named, *common)}
    del run.__wrapped__
    return run


def _complete_name(context: typer.Context, incomplete: str) -> list[str]:
    """Names of FineTuneJobs; none where there is no cluster."""
    values = context.params
    try:
        cluster = Cluster.connect(*(values.get(each) for each in (KUBECONFIG, CONTEXT, NAMESPACE)))
        names = [str(each["metadata"]["name"]) for each in cluster.jobs()]
    except CliError:
        return []
    return [name for name in names if name.startswith(incomplete)]


Name = Annotated[str, typer.Argument(help="The FineTuneJob.", autocompletion=_complete_name)]
Output = Annotated[Form, typer.Option("--output", "-o", help="How to print it.")]
Files = Annotated[
    list[Path],
    typer.Option("--filename", "-f", help="YAML file, or - for standard input (repeatable)."),
]
