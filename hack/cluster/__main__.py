"""`python -m hack.cluster`: bring a cluster up, look at it, use it, remove it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from hack.cluster import binaries
from hack.cluster.provider import DEFAULT_NAME, Cluster, choose
from hack.process import ClusterError, Unavailable

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
Name = Annotated[str, typer.Option(help="Which cluster of this checkout.")]


@contextmanager
def _errors_in_words() -> Iterator[None]:
    try:
        yield
    except ClusterError as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from error


def _describe(cluster: Cluster) -> None:
    typer.echo(f"provider:     {cluster.name}")
    typer.echo(f"kubeconfig:   {cluster.kubeconfig}")
    typer.echo(f"host address: {cluster.node_address} (of this machine, as pods see it)")


@app.command()
def up(name: Name = DEFAULT_NAME) -> None:
    """Bring the cluster up, or what of it is not running."""
    with _errors_in_words():
        cluster = choose(name)
        if not cluster.healthy():
            typer.echo("This will:")
            for line in cluster.announce():
                typer.echo(f"  - {line}")
        cluster.up()
        _describe(cluster)


@app.command()
def down(name: Name = DEFAULT_NAME) -> None:
    """Remove the cluster with everything in it."""
    with _errors_in_words():
        choose(name).down()


@app.command()
def status(name: Name = DEFAULT_NAME) -> None:
    """Say whether the cluster is healthy; exits with 1 if not."""
    with _errors_in_words():
        cluster = choose(name)
        if not cluster.healthy():
            typer.echo(f"the {cluster.name} cluster {name} is not running, or not healthy")
            raise typer.Exit(1)
        _describe(cluster)
        typer.echo(cluster.kubectl("get", "nodes,pods", "--all-namespaces"))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def kubectl(context: typer.Context, name: Name = DEFAULT_NAME) -> None:
    """Run kubectl on the cluster as its administrator."""
    with _errors_in_words():
        program = str(binaries.kubectl())
        kubeconfig = str(choose(name).kubeconfig)
    os.execv(program, [program, "--kubeconfig", kubeconfig, *context.args])  # noqa: S606 - no shell wanted


def _native_node_is_used() -> bool:
    try:
        return choose().name == "native"
    except Unavailable:
        return False


@app.command()
def build_binaries(
    node: Annotated[
        bool | None,
        typer.Option(help="Also what a node needs; by default where the native node is used."),
    ] = None,
) -> None:
    """Find the programs of Kubernetes, or build them into the user's cache."""
    with _errors_in_words():
        if node is None:
            node = _native_node_is_used()
        found = binaries.ensure(binaries.NODE if node else binaries.CONTROL_PLANE)
    for program, path in found.items():
        typer.echo(f"{program:24} {path}")


if __name__ == "__main__":
    app()
