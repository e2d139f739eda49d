"""`make demo`: the main job, from a CSV in a bucket to a GGUF that answers.

python -m tests.e2e.demo up      bring everything up and run the example
python -m tests.e2e.demo down    remove it
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import typer
import yaml
from rich import filesize
from rich.console import Console
from rich.table import Table

from finetune_trainer.contract import Artifact
from finetune_trainer.local.quality import show_quality
from tests.cluster import provider
from tests.cluster.errors import ClusterError
from tests.cluster.paths import REPOSITORY, cache_dir, state_dir
from tests.cluster.progress import step
from tests.e2e import answers, environment
from tests.e2e.environment import NAMESPACE, Environment
from tests.e2e.follow import follow

NAME = "demo"
JOB_SECONDS = 1800

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
console = Console()


@app.command()
def up() -> None:
    """Bring up cluster, store and operator; run examples/finetunejob.yaml; show the result."""
    started = time.monotonic()
    announce()
    env = environment.bring_up(NAME)
    job = run_example(env)
    show_resource(env)
    show_quality(files_of(job))
    if job["status"]["phase"] != "Succeeded":
        console.print(f"[red]The job failed:[/] {ready_message(job)}")
        raise typer.Exit(1)
    show_artifacts(job)
    right = show_answers(env, job)
    say_how_to_go_on(env)
    console.print(f"Took {time.monotonic() - started:.0f} s.")
    if not right:
        console.print("[red]The tuned model did not answer every question.[/]")
        raise typer.Exit(1)


@app.command()
def down() -> None:
    """Remove the cluster, the store and their data; what was built stays in the cache."""
    environment.take_down(NAME)


def announce() -> None:
    """Say what is about to be set up, and where."""
    cluster = provider.choose(NAME)
    console.rule("finetune-operator demo")
    console.print(
        f"Sets up, on this machine: a single-node Kubernetes ({cluster.name}), SeaweedFS as the "
        "object store, the operator by its Helm chart, and runs examples/finetunejob.yaml: "
        "SmolLM2-135M-Instruct learns a small CSV on the CPU.\n"
        f"State goes to {state_dir(NAME).relative_to(REPOSITORY)}/, what is built to {cache_dir()} "
        "(up to about 10 GB).",
        soft_wrap=True,
    )
    for line in cluster.announce():
        console.print(f"Outside of these two folders: {line}", soft_wrap=True, markup=False)
    console.print("`make demo-down` removes all of it.\n")


def run_example(env: Environment) -> dict[str, Any]:
    """Apply the example and follow it to its end; returns the FineTuneJob."""
    name = yaml.safe_load(environment.EXAMPLE.read_text())["metadata"]["name"]
    console.print(f"$ kubectl apply -n {NAMESPACE} -f examples/{environment.EXAMPLE.name}")
    console.print(env.kubectl("apply", "-f", str(environment.EXAMPLE)).strip(), markup=False)
    return follow(env.reader(name), console, JOB_SECONDS)


def ready_message(job: dict[str, Any]) -> str:
    """Why the job is not ready: reason and message of its Ready condition."""
    conditions = job.get("status", {}).get("conditions", [])
    ready: dict[str, str] = next((c for c in conditions if c["type"] == "Ready"), {})
    return f"{ready.get('reason')}: {ready.get('message')}"


def show_resource(env: Environment) -> None:
    """Print what `kubectl get -o wide` prints."""
    console.print(f"\n$ kubectl get ftj -n {NAMESPACE} -o wide")
    console.print(env.kubectl("get", "ftj", "-o", "wide"), markup=False, soft_wrap=True)


def show_artifacts(job: dict[str, Any]) -> None:
    """Print the artifacts as the status lists them."""
    folder = job["spec"]["output"]["uri"]
    console.print(f"Artifacts in {folder}:", highlight=False)
    for artifact in job["status"]["artifacts"]:
        path = artifact["uri"].removeprefix(folder + "/")
        size = filesize.decimal(artifact["bytes"])
        console.print(
            f"  {path:44} {size:>9}  {artifact['sha256']}", soft_wrap=True, highlight=False
        )


def files_of(job: dict[str, Any]) -> list[Artifact]:
    """The artifacts of the status, with paths below the output folder."""
    folder = job["spec"]["output"]["uri"]
    listed = job["status"].get("artifacts", [])
    return [
        Artifact(
            path=each["uri"].removeprefix(f"{folder}/"),
            bytes=each["bytes"],
            sha256=each["sha256"],
            quality=each.get("quality"),
        )
        for each in listed
    ]


def models_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The artifacts that are whole models as GGUF: not the adapter, and none that was rejected."""
    artifacts: list[dict[str, Any]] = job["status"]["artifacts"]
    return [
        each
        for each in artifacts
        if "/gguf/" in each["uri"]
        and each["uri"].endswith(".gguf")
        and not each["uri"].endswith("-LoRA-F32.gguf")
    ]


def smallest_gguf(job: dict[str, Any]) -> dict[str, Any]:
    """The artifact that most people would serve on a small machine."""
    return min(models_of(job), key=lambda artifact: int(artifact["bytes"]))


def download(env: Environment, uri: str, folder: Path) -> Path:
    """Fetch one object from the store."""
    location = urlparse(uri)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / Path(location.path).name
    env.store.client().download_file(location.netloc, location.path.lstrip("/"), str(target))
    return target


def show_answers(env: Environment, job: dict[str, Any]) -> bool:
    """Ask both models, print the answers; tells whether the tuned one was right every time."""
    asked = answers.questions()
    artifact = smallest_gguf(job)
    with step(f"Asking {Path(artifact['uri']).name} and the base model"):
        tuned_file = download(env, artifact["uri"], env.downloads)
        base, tuned = answers.ask(answers.base_gguf(), asked), answers.ask(tuned_file, asked)
    table = Table("Question", "Base model", "Tuned", show_lines=True)
    right = True
    for question, before, after in zip(asked, base, tuned, strict=True):
        good = question.answered_by(after)
        right = right and good
        table.add_row(question.text, before, f"{'[green]✓' if good else '[red]✗'}[/] {after}")
    console.print(table)
    return right


def say_how_to_go_on(env: Environment) -> None:
    """Print how to use what is running now."""
    console.print(
        f"\nGo on with:\n  export KUBECONFIG={env.cluster.kubeconfig}\n"
        f"  kubectl get ftj -n {NAMESPACE} -o yaml\n"
        f"  kubectl logs -n {NAMESPACE} -l finetune.dev/stage=train --tail=40\n"
        "  make demo-down",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    try:
        app()
    except (ClusterError, TimeoutError) as error:
        sys.exit(f"demo: {error}")
