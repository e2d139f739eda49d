"""`make demo`: the main job, from a CSV in a bucket to a GGUF that answers.

python -m hack.demo up      bring everything up and run the example
python -m hack.demo down    remove it
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import typer
import yaml
from rich import filesize
from rich.console import Console
from rich.table import Table

from finetune_trainer.contract import Artifact
from finetune_trainer.local import show_quality
from hack import REPOSITORY, cache_dir, state_dir
from hack.cluster import provider
from hack.demo import environment, models
from hack.demo.environment import NAMESPACE, SECRET, Environment
from hack.demo.follow import follow, ready_message
from hack.process import ClusterError
from hack.progress import step

NAME = "demo"
JOB_SECONDS = 1800
EXPORTS = "{{range $k, $v := .data}}export {{$k}}={{$v | base64decode}} {{end}}"
STARTED = "DEMO_STARTED"
"""Variable with the second of the epoch at which `make demo` began."""

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
console = Console()


@app.command()
def up() -> None:
    """Bring up cluster, store and operator; run examples/finetunejob.yaml; show the result."""
    announce()
    env = environment.bring_up_demo(NAME)
    job = run_example(env)
    show_resource(env)
    show_quality(files_of(job))
    if job["status"]["phase"] != "Succeeded":
        console.print(f"[red]The job failed:[/] {ready_message(job)}")
        raise typer.Exit(1)
    show_artifacts(job)
    right = show_answers(env, job)
    report = fetch_report(env, job)
    say_how_to_go_on(env, job, report)
    if not right:
        console.print("[red]The tuned model did not answer every question.[/]")
    console.print(f"Took {seconds_since_the_start():.0f} s in all.")
    if not right:
        raise typer.Exit(1)


@app.command()
def down() -> None:
    """Remove the cluster, the store and their data; what was built stays in the cache."""
    environment.take_down(NAME)


def seconds_since_the_start() -> float:
    """Since `make demo` began, with what it built first; else since this program did."""
    started = os.environ.get(STARTED)
    return time.time() - (float(started) if started else psutil.Process().create_time())


def announce() -> None:
    """Say what is about to be set up, and where."""
    cluster = provider.choose(NAME)
    console.rule("finetune-operator demo")
    console.print(
        f"Sets up, on this machine: a single-node Kubernetes ({cluster.name}), and by the Helm "
        "chart the operator and an object store (demoStore); then runs examples/finetunejob.yaml: "
        "SmolLM2-135M-Instruct learns a small CSV on the CPU.\n"
        "Images (unpacked): operator 0.3 GB, trainer 1.6 GB (7 GB where pip has PyTorch for CUDA), "
        "store 0.7 GB. With nothing built it takes about 20 minutes on 2 cores, with everything "
        "built about 5.\n"
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


def show_resource(env: Environment) -> None:
    """Print what `kubectl get -o wide` prints."""
    console.print(f"\n$ kubectl get ftj -n {NAMESPACE} -o wide")
    console.print(env.kubectl("get", "ftj", "-o", "wide"), markup=False, soft_wrap=True)


def show_artifacts(job: dict[str, Any]) -> None:
    """Print the artifacts as the status lists them."""
    folder = models.version_folder(job)
    console.print(f"Artifacts in {folder}:", highlight=False)
    for artifact in job["status"]["artifacts"]:
        path = artifact["uri"].removeprefix(folder + "/")
        size = filesize.decimal(artifact["bytes"])
        console.print(
            f"  {path:44} {size:>9}  {artifact['sha256']}", soft_wrap=True, highlight=False
        )


def files_of(job: dict[str, Any]) -> list[Artifact]:
    """The artifacts of the status, with paths below the version's folder."""
    folder = models.version_folder(job)
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


def show_answers(env: Environment, job: dict[str, Any]) -> bool:
    """Ask both models, print the answers; tells whether the tuned one was right every time."""
    asked = models.questions()
    artifact = models.smallest_gguf(job)
    with step(f"Asking {Path(artifact['uri']).name} and the base model"):
        tuned_file = models.download(env, artifact["uri"], env.downloads)
        base, tuned = models.ask(models.base_gguf(), asked), models.ask(tuned_file, asked)
    table = Table("Question", "Base model", "Tuned", show_lines=True)
    right = True
    for question, before, after in zip(asked, base, tuned, strict=True):
        good = question.answered_by(after)
        right = right and good
        table.add_row(question.text, before, f"{'[green]✓' if good else '[red]✗'}[/] {after}")
    console.print(table)
    return right


def fetch_report(env: Environment, job: dict[str, Any]) -> Path:
    """Download the report, to be opened in a browser."""
    return models.download(env, f"{models.version_folder(job)}/report.html", env.downloads)


def say_how_to_go_on(env: Environment, job: dict[str, Any], report: Path) -> None:
    """Print how to use what is running now."""
    console.print(
        f"\nThe report, for a browser:\n  {report}\n"
        f"Go on with:\n  export KUBECONFIG={env.cluster.kubeconfig}\n"
        f"  kubectl get ftj -n {NAMESPACE} -o yaml\n"
        f"  kubectl logs -n {NAMESPACE} -l finetune.dev/stage=train --tail=40\n"
        "  make demo-down\n"
        f"The bucket, by any S3 client (the variables name the store and its keys):\n"
        f"  eval \"$(kubectl get secret {SECRET} -n {NAMESPACE} -o go-template='{EXPORTS}')\"\n"
        f"  AWS_DEFAULT_REGION=us-east-1 aws s3 ls --recursive {job['spec']['output']['uri']}/",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    try:
        app()
    except (ClusterError, TimeoutError) as error:
        sys.exit(f"demo: {error}")
