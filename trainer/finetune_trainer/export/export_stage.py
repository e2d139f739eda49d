"""export: merge, convert, quantize, check each file, publish a new version by its manifest."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune_trainer.contract import (
    Artifact,
    DatasetReport,
    Export,
    GateReport,
    Lineage,
    Manifest,
    Notice,
    NoticeCode,
    PreparedRunConfig,
    Quantization,
    Reason,
    RunConfig,
    Stage,
    StageError,
    StageResult,
    TrainingRecord,
    display_name,
    is_mounted,
)
from finetune_trainer.contract.artifacts import PART_BYTES
from finetune_trainer.contract.verdict import explain_failures
from finetune_trainer.export.gate.kept import KeptFigures
from finetune_trainer.export.inputs import (
    MERGED,
    AddFile,
    ExportContext,
    ExportInputs,
    fetch_examples,
    fetch_inputs,
    open_tuned_model,
    publish_folder,
)
from finetune_trainer.export.merge import MergedWeights
from finetune_trainer.export.pipeline import make_models
from finetune_trainer.export.publish import Publication, Published, Sign, finish
from finetune_trainer.export.publish.hub_push import check_token, push
from finetune_trainer.export.publish.oci_push import push_images, read_login
from finetune_trainer.export.publish.signing import signer_for
from finetune_trainer.export.report import Facts, license_of, write_model_card, write_report
from finetune_trainer.memory.forecast import (
    ExportWork,
    Machine,
    Widths,
    check_disk,
    export_bytes,
    export_disk,
    forecast,
)
from finetune_trainer.memory.machine import free_memory
from finetune_trainer.model import ModelFolder, prequantized
from finetune_trainer.model.loading import available_cpus
from finetune_trainer.model.shape import Shape
from finetune_trainer.runtime import binary, duration, size, timestamp
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import Folder, open_folder
from finetune_trainer.store.marker import (
    DATASET_REPORT,
    MANIFEST,
    METRICS,
    check_owner,
    open_stage,
)
from finetune_trainer.store.versions import (
    Version,
    manifest_of,
    prune,
    summarize_versions,
    version_name,
)

UNKNOWN_PARAMETERS = 1e9
MODEL_CARD, REPORT = "README.md", "report.html"
_PACKAGES = ("finetune-operator", "torch", "transformers", "trl", "peft", "llama-cpp-python")


@dataclass(frozen=True)
class ExportRun:
    config: PreparedRunConfig
    inputs: ExportInputs
    workspace: Path
    publication: Publication
    kept: KeptFigures
    reporter: Reporter

    @property
    def result(self) -> Path:
        """Folder for the files of the output."""
        return self.workspace / "result"


def run(config: PreparedRunConfig, workspace: Path, reporter: Reporter) -> StageResult:
    """Make the version for `config.resolved`, and push it where that is asked for.

    A version that stands is not made again, also if the quality gate refused one of its files.
    Raises StageError; a push that failed is all that the next attempt has to do.
    """
    reporter.begin(Stage.EXPORT, "Fetching what was trained")
    sign = signer_for(config.export, display_name(config.model.source))
    check_token(config.output.hub)
    login = read_login(config.output.oci)
    output = open_folder(config.output.folder, config.storage)
    check_owner(output, config.output, config.job)
    prints = config.resolved.fingerprints
    published = finish(output, prints.export) or make_and_publish(
        config, workspace, output, sign, reporter
    )
    result = result_of(config, output, published)
    if result.reason is not Reason.SUCCEEDED:
        return result
    if config.output.hub:
        push(config.output.hub, output, published.version, workspace, reporter, sign=sign)
    if oci := config.output.oci:
        images = push_images(
            oci,
            config.export,
            output,
            published.version,
            workspace=workspace,
            reporter=reporter,
            login=login,
        )
        result = result.model_copy(update={"images": images})
    if config.output.keep_versions:
        prune(output, config.output.keep_versions, prints)
        result = result.model_copy(update={"versions": summarize_versions(output)})
    return result


def make_and_publish(
    config: PreparedRunConfig,
    workspace: Path,
    output: Folder,
    sign: Sign | None,
    reporter: Reporter,
) -> Published:
    """Make all files, and let them be the current version."""
    inputs = fetch_inputs(config, output, workspace)
    fingerprint = config.resolved.fingerprints.export
    with Publication(output, fingerprint, reporter) as publication:
        kept = KeptFigures(output, fingerprint)
        manifest = make_all(ExportRun(config, inputs, workspace, publication, kept, reporter))
        check_owner(output, config.output, config.job)  # hours may have passed
        return publication.commit(lambda files: encoded(manifest, files), sign)


def make_all(export: ExportRun) -> Manifest:
    """Make all files; returns the manifest but for their list."""
    config, inputs = export.config, export.inputs
    export.result.mkdir()
    work = expected_work(config, inputs.training)
    export.reporter.expect_work(forecast(work, Machine(available_cpus())))
    if config.training.method != "full":
        publish_folder(export.publication.add, inputs.adapter)
    export.publication.add(inputs.dataset_report, inputs.dataset_report.name)
    base, gate = None, GateReport()
    if config.export.merged or config.export.merged_fp8 or config.export.gguf:
        with export.reporter.part("fetch"):
            base = prequantized.fetch_whole(config, export.workspace / "model", export.reporter)
        gate = make_from(export, base)
    manifest = Manifest(
        fingerprint=config.resolved.fingerprints.export,
        version=version_name(config.resolved.fingerprints.export),
        files=(),
        created=timestamp(),
        lineage=lineage_of(config, inputs.training, inputs.dataset),
        metrics=inputs.training.metrics.named(),
        gate=gate,
    )
    export.reporter.message("Writing model card and report")
    describe(export, base, manifest)
    return manifest


def expected_work(config: RunConfig, trained: TrainingRecord) -> ExportWork:
    """What has to be done; of a model of unknown size, as for one of UNKNOWN_PARAMETERS."""
    return ExportWork(
        trained.metrics.base_parameters or UNKNOWN_PARAMETERS,
        config.export,
        adapter=config.training.method != "full",
        downloads=not is_mounted(config.model.source),
    )


def make_from(export: ExportRun, base: ModelFolder) -> GateReport:
    """Write the merged model and GGUF files. Each is uploaded when it is finished."""
    config, inputs = export.config, export.inputs
    folder = (export.result if config.export.merged else export.workspace) / MERGED
    model = open_tuned_model(config, base, inputs.adapter, folder)
    work = replace(
        expected_work(config, inputs.training),
        parameters=sum(math.prod(info.shape) for info in model.weights.infos.values()),
        own=model.files.own_type,
    )
    seconds = check_memory(model.weights, work, available_cpus(), export.reporter)
    export.reporter.expect_work(seconds)
    check_space(config, base.path, export.workspace, model.files.own_type)
    context = ExportContext(
        config=config,
        model=model,
        examples=inputs.examples,
        result=export.result,
        workspace=export.workspace,
        add_file=export.publication.add,
        reporter=export.reporter,
        discard=export.publication.discard,
        part_bytes=PART_BYTES,
        kept=export.kept,
        uploads=export.publication,
    )
    return make_models(context)


def convert_merged(
    config: PreparedRunConfig, folder: Path, store: Folder, add_file: AddFile, reporter: Reporter
) -> GateReport:
    """GGUF files in `folder` of the model that lies merged there, on one machine."""
    with tempfile.TemporaryDirectory(prefix="gguf-", dir=folder) as workspace:
        merged = ModelFolder(folder / MERGED, config.model.trust_remote_code)
        context = ExportContext(
            config=config,
            model=open_tuned_model(config, merged, None, merged.path),
            examples=fetch_examples(config, store, Path(workspace)),
            result=folder,
            workspace=Path(workspace),
            add_file=add_file,
            reporter=reporter,
        )
        return make_models(context)


def describe(export: ExportRun, base: ModelFolder | None, manifest: Manifest) -> None:
    """Write model card and report of all files so far."""
    written = write_texts(
        export.result,
        export.config,
        export.inputs.training,
        export.inputs.dataset,
        gate=manifest.gate,
        files=export.publication.artifacts,
        created=manifest.created,
        base=base.path if base else None,
    )
    for name in written:
        export.publication.add(export.result / name, name)


def describe_converted(
    config: PreparedRunConfig,
    folder: Path,
    store: Folder,
    gate: GateReport,
    files: Sequence[Artifact],
) -> None:
    """Write model card and report of what `convert_merged` made, in `folder`."""
    prints = config.resolved.fingerprints
    trained = open_stage(store, Stage.TRAIN, prints.train).read(METRICS)
    found = open_stage(store, Stage.PREPARE, prints.prepare).read(DATASET_REPORT)
    write_texts(
        folder,
        config,
        TrainingRecord.model_validate_json(trained),
        DatasetReport.model_validate_json(found),
        gate=gate,
        files=tuple(files),
        created=timestamp(),
        base=folder / MERGED,
    )


def write_texts(
    folder: Path,
    config: PreparedRunConfig,
    trained: TrainingRecord,
    dataset: DatasetReport,
    *,
    gate: GateReport,
    files: tuple[Artifact, ...],
    created: str,
    base: Path | None,
) -> tuple[str, ...]:
    """Write model card and report to a folder; returns their names. `base` tells the license."""
    facts = Facts(
        config=config,
        lineage=lineage_of(config, trained, dataset),
        trained=trained,
        dataset=dataset,
        gate=gate,
        files=files,
        created=created,
        license=license_of(base),
    )
    write_model_card(folder / MODEL_CARD, facts)
    write_report(folder / REPORT, facts)
    return MODEL_CARD, REPORT


def lineage_of(config: PreparedRunConfig, trained: TrainingRecord, found: DatasetReport) -> Lineage:
    """What the files are made from."""
    resolved = config.resolved
    return Lineage(
        dataset=config.dataset.source,
        dataset_etag=resolved.dataset_etag,
        dataset_files=found.shards,
        dataset_rows=resolved.dataset_rows,
        eval_source=config.dataset.eval_source,
        eval_files=found.eval_source.shards if found.eval_source else None,
        eval_rows=resolved.eval_rows,
        columns=config.dataset.columns.model_dump(exclude_none=True),
        model=config.model.source,
        model_revision=resolved.model_revision,
        model_commit=resolved.model_commit,
        init_from=config.training.init_from.source if config.training.init_from else None,
        init_revision=resolved.init_revision,
        hyperparameters=trained.hyperparameters,
        fingerprints=resolved.fingerprints,
        versions=package_versions(),
    )


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide on the result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def encoded(manifest: Manifest, files: tuple[Artifact, ...]) -> bytes:
    """The bytes of manifest.json, with the list of files."""
    whole = manifest.model_copy(update={"files": files})
    return whole.model_dump_json(indent=2, exclude_none=True).encode() + b"\n"


def result_of(config: PreparedRunConfig, output: Folder, published: Published) -> StageResult:
    """The stage's result. A rejected file fails it, though the others are published."""
    version = published.version
    files = version.marker.files
    said = [f"{len(files)} files in {output.uri_of(version.folder)}.", explain(config, version)]
    if published.current.name != version.name:
        said.append(f"{output.uri_of(MANIFEST)} goes on naming {published.current.described}.")
    return StageResult(
        stage=Stage.EXPORT,
        reason=reason_of(files),
        message=" ".join(filter(None, said)),
        artifacts=files,
        version=version.name or None,
        manifest_uri=output.uri_of(version.manifest_path),
        versions=summarize_versions(output),
    )


def explain(config: PreparedRunConfig, version: Version) -> str:
    """What the quality gate found fault with, as the version's manifest says."""
    manifest = manifest_of(version)
    return explain_failures(manifest.gate, manifest.files, config.export) if manifest else ""


def reason_of(files: Sequence[Artifact]) -> Reason:
    """Whether all files may be used."""
    bad = any(item.rejected for item in files)
    return Reason.QUALITY_GATE_FAILED if bad else Reason.SUCCEEDED


EXPERT = re.compile(r"\.experts\.\d+\.")
LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
KEYS = re.compile(r"\.k_proj\.|\.key\.")


def memory_need(weights: MergedWeights, export: Export) -> int:
    """Bytes for all processes of an export, beside mapped files.

    transformers stacks a model's experts as it loads them, so that they are no mapped file; and
    the converter has all of one layer's in memory.
    """
    values: Counter[str] = Counter()
    experts = 0
    for info in weights.infos.values():
        values[EXPERT.sub(".experts.", info.name)] += math.prod(info.shape)
        experts += info.nbytes if EXPERT.search(info.name) else 0
    largest = max(values.values(), default=0)
    return export_bytes(widths_of(weights), export, largest, experts)


def widths_of(weights: MergedWeights) -> Widths:
    """Of a model, by the shapes of its matrices."""
    matrices = {info.name: info.shape for info in weights.infos.values() if len(info.shape) == 2}
    inside = {name: shape for name, shape in matrices.items() if LAYER.search(name)}
    outside = [shape for name, shape in matrices.items() if name not in inside]
    vocabulary, hidden = max(outside, default=(0, 0))
    keys = [rows for name, (rows, _) in inside.items() if KEYS.search(name)]
    return Widths(
        vocabulary=vocabulary,
        hidden=hidden,
        mlp=max((rows for rows, _ in inside.values()), default=0),
        key_value=max(keys, default=hidden),
        layers=len(set(LAYER.findall("".join(f"{name} " for name in inside)))),
    )


def check_memory(
    weights: MergedWeights, work: ExportWork, cpus: int, reporter: Reporter
) -> dict[str, float]:
    """How long each part of the export takes with the memory of this pod, in seconds.

    Says so where the files don't fit into what is left of it, since it takes longer then. Raises
    StageError(OutOfMemory) when the pod has less than an export takes.
    """
    free, need = free_memory(), memory_need(weights, work.export)
    if free < need:
        raise StageError(
            Reason.OUT_OF_MEMORY,
            f"The export needs {binary(need)} of memory, and there are {binary(free)}: set "
            f"spec.stages.export.resources.limits.memory to at least {binary(need, up=True)}.",
        )
    largest = sum(info.nbytes for info in weights.infos.values())
    seconds = forecast(work, Machine(cpus, free - need))
    longer, enough = sum(seconds.values()), sum(forecast(work, Machine(cpus)).values())
    if longer > enough:
        notice = Notice(
            code=NoticeCode.MODEL_READ_AGAIN,
            evidence=f"The model has {size(largest)} in 16 bits, and {size(free - need)} of memory "
            f"are left for it, so that it is read from the disk again and again: the export takes "
            f"about {duration(longer)}, and {duration(enough)} with enough memory",
            remedy="Set spec.stages.export.resources.limits.memory to "
            f"{binary(need + largest, up=True)}, or wait.",
        )
        reporter.notice(notice)
    return seconds


def check_space(config: RunConfig, base: Path, workspace: Path, own: Quantization) -> None:
    """Raise StageError(OutOfDisk) when merged model and GGUF files will not fit beside the base.

    `base` is the folder with the base model, `own` its weights' type; where its widths can't be
    read, nothing is checked.
    """
    shape = Shape.of_model(base)
    if shape is None:
        return
    need = export_disk(shape, config.training, config.export, 0, own)
    # Nothing here is downloaded any more, so that no slack is needed for it.
    need = replace(need, slack=0)
    limit = "set stages.export.resources.limits.ephemeral-storage (or the volume) to"
    check_disk(need, shutil.disk_usage(workspace).free, "The export", limit)
