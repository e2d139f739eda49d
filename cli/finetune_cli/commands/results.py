"""artifacts, report, compare: what jobs have made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune_cli.cluster import Cluster, JsonObject
from finetune_cli.exits import CliError, ExitCode
from finetune_cli.job import Job
from finetune_cli.options import Name, Output, on_cluster
from finetune_cli.output import Column, Form, bytes_in_words, note, show_object, show_table
from finetune_cli.version import MANIFEST, Version

REPORT = "report.html"
FILES = (
    Column("FILE", 9),
    Column("SIZE", 8, right=True),
    Column("VERDICT", 7),
    Column("KL", 4, right=True),
    Column("SHA256", 1),
)
UNITS = ("model", "dataset", "training", "export")  # parts of the spec that make a difference

VersionOption = Annotated[
    str | None, typer.Option("--version", help="Name of a version; default: the current one.")
]
Endpoint = Annotated[
    str | None, typer.Option(help="The store's URL as seen from here; default: the job's.")
]


@on_cluster
def artifacts(
    cluster: Cluster,
    name: Name,
    *,
    download: Annotated[
        Path | None, typer.Option("--download", "-d", help="Folder to fetch the files into.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Files to fetch, e.g. 'gguf/*Q4*' (repeatable).")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write over files with another content.")
    ] = False,
    version: VersionOption = None,
    endpoint: Endpoint = None,
    output: Output = Form.TABLE,
) -> None:
    """List the files of a job, or download them with checksums.

    A download that was cut off goes on where it ended. Listing the current version needs no access
    to the bucket. Files that the quality gate refused are fetched only where --only names them.
    """
    job = Job(cluster.job(name))
    if download is None:
        _list(job, Version.read(job, version, endpoint) if version else None, output)
        return
    found = Version.read(job, version, endpoint)
    files = found.chosen(only or [])
    if not force:
        found.refuse_to_overwrite(files, download)
    size = bytes_in_words(sum(each.bytes for each in files))
    note(f"{len(files)} files, {size}, of version {found.name} from {found.bucket.where}")
    found.download(files, download)
    (download / MANIFEST).write_bytes(found.raw)
    typer.echo(f"{len(files)} files in {download}, each with the manifest's SHA-256.")


def _list(job: Job, version: Version | None, output: Form) -> None:
    from finetune_trainer.contract.verdict import Quality, word_for

    if version is None:
        rows = _of_status(job)
    else:
        rows = [each.model_dump(mode="json", exclude_none=True) for each in version.files]
    if output in (Form.JSON, Form.YAML):
        show_object(rows, output)
        return
    if not rows:
        raise CliError(
            ExitCode.NOT_FOUND,
            f"{job.name} has made nothing yet ({job.phase}): `finetune watch {job.name}`.",
        )
    if output is Form.NAME:
        for each in rows:
            typer.echo(each["path"])
        return
    from finetune_trainer.contract import Artifact, read_readable

    cells = []
    for each in rows:
        read = read_readable(Artifact, each)
        verdict = word_for(read.value).text if read and each["path"].endswith(".gguf") else ""
        quality = read_readable(Quality, each["quality"]) if each.get("quality") else None
        divergence = f"{quality.value.kl_divergence:.3g}" if quality else ""
        size = bytes_in_words(int(each["bytes"]))
        cells.append([each["path"], size, verdict, divergence, str(each["sha256"])])
    show_table(FILES, cells)


def _of_status(job: Job) -> list[JsonObject]:
    """The files in status, with their paths below the version's folder."""
    folder = str(job.status.get("manifestUri") or "").rpartition("/")[0]
    rows = []
    for each in job.artifacts:
        rest = {key: value for key, value in each.items() if key != "uri"}
        rows.append({"path": str(each["uri"]).removeprefix(f"{folder}/"), **rest})
    return rows


@on_cluster
def report(
    cluster: Cluster,
    name: Name,
    *,
    to: Annotated[
        Path | None, typer.Option("--to", help="File; default: NAME-report.html here.")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    version: VersionOption = None,
    endpoint: Endpoint = None,
) -> None:
    """Fetch the report of a job's result, one page of HTML."""
    found = Version.read(Job(cluster.job(name)), version, endpoint)
    file = next((each for each in found.files if each.path == REPORT), None)
    if file is None:
        raise CliError(ExitCode.NOT_FOUND, f"version {found.name} has no {REPORT}.")
    target = (to or Path(f"{name}-report.html")).absolute()
    found.bucket.download(found.uri(file), target, file.bytes, file.sha256)
    typer.echo(str(target))
    if show:
        import webbrowser

        webbrowser.open(target.as_uri())


@on_cluster
def compare(
    cluster: Cluster,
    first: Annotated[str, typer.Argument(help="A job, or NAME@VERSION.")],
    second: Annotated[str, typer.Argument(help="Another one, or another version.")],
    endpoint: Endpoint = None,
    output: Output = Form.TABLE,
) -> None:
    """Say how two jobs or versions differ: settings, losses, sizes.

    A job is compared by its spec and status, a version by its manifest in the bucket.
    """
    sides = [_facts(cluster, each, endpoint) for each in (first, second)]
    keys = list(dict.fromkeys([*sides[0], *sides[1]]))
    rows = [(key, sides[0].get(key), sides[1].get(key)) for key in keys]
    different = [row for row in rows if row[1] != row[2]]
    if output in (Form.JSON, Form.YAML):
        show_object({key: {first: a, second: b} for key, a, b in different}, output)
    elif not different:
        typer.echo(f"{first} and {second} don't differ.")
    else:
        columns = (Column("FIELD", 9), Column(first, 9), Column(second, 9))
        show_table(columns, [[key, word(a), word(b)] for key, a, b in different])


def _facts(cluster: Cluster, named: str, endpoint: str | None) -> dict[str, Any]:
    """What there is to compare, by field."""
    name, _, version = named.partition("@")
    job = Job(cluster.job(name))
    if version:
        found = Version.read(job, version, endpoint)
        files = [each.model_dump(mode="json", exclude_none=True) for each in found.files]
        lineage = dict(found.manifest.get("lineage") or {})
        settings = {"training": lineage.pop("hyperparameters", {})}
        known = ("model", "modelRevision", "dataset", "datasetETag", "datasetRows", "evalRows")
        facts = {key: lineage[key] for key in known if key in lineage}
        return facts | flat(settings) | _measured(found.manifest.get("metrics") or {}, files)
    facts = flat({part: job.spec[part] for part in UNITS if part in job.spec})
    return facts | _measured(job.status.get("metrics") or {}, _of_status(job))


def _measured(metrics: JsonObject, files: list[JsonObject]) -> dict[str, Any]:
    """Figures of the training, and size and divergence of each GGUF file by its type."""
    facts = {f"metrics.{key}": value for key, value in sorted(metrics.items())}
    for each in files:
        if not each["path"].endswith(".gguf"):
            continue
        kind = each["path"].removesuffix(".gguf").rpartition("-")[2]
        facts[f"{kind}.bytes"] = each["bytes"]
        for figure in ("klDivergence", "sameTopToken", "perplexity", "passed"):
            if figure in (each.get("quality") or {}):
                facts[f"{kind}.{figure}"] = each["quality"][figure]
    return facts


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves of a document by their paths; lists are leaves."""
    if not isinstance(value, dict):
        return {path: value}
    found: dict[str, Any] = {}
    for key, each in value.items():
        found |= flat(each, f"{path}.{key}" if path else key)
    return found


def word(value: Any) -> str:
    """A value in a table."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.5g}"
    return value if isinstance(value, str) else json.dumps(value)
