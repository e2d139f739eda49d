"""export: merge, convert, quantize, check each file, publish with the manifest last."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer.contract import Artifact, GateReport, Reason, RunConfig, Stage, StageResult
from finetune_trainer.contract.verdict_words import explain_failures
from finetune_trainer.export.inputs import Inputs, check_memory, check_space, fetch, fetch_examples
from finetune_trainer.export.manifest import Manifest, lineage_of, now
from finetune_trainer.export.pipeline import (
    MERGED,
    Add,
    Making,
    add_folder,
    make_gguf,
    make_merged,
    put_together,
)
from finetune_trainer.export.publish import Publication, finish_interrupted
from finetune_trainer.export.publish.hub import check_token, push
from finetune_trainer.export.publish.publication import Sign
from finetune_trainer.export.publish.signing import signer_for
from finetune_trainer.export.report import Facts, license_of, write_model_card, write_report
from finetune_trainer.model import source
from finetune_trainer.runtime.progress import Reporter
from finetune_trainer.store import Folder, open_folder
from finetune_trainer.store.marker import MANIFEST

MODEL_CARD, REPORT = "README.md", "report.html"


@dataclass(frozen=True)
class Work:
    """What the stage has in hand."""

    config: RunConfig
    inputs: Inputs
    workspace: Path
    publication: Publication
    reporter: Reporter

    @property
    def result(self) -> Path:
        """Folder for the files of the output."""
        return self.workspace / "result"


def run(config: RunConfig, workspace: Path, reporter: Reporter) -> StageResult:
    """Make the artifacts for `config.resolved`, and push them where that is asked for.

    Raises StageError; a push that failed is all that the next attempt has to do.
    """
    reporter.begin(Stage.EXPORT, "Fetching the adapter")
    sign = signer_for(config.export, source.display_name(config.model.source))
    check_token(config.output.hub)
    output = open_folder(config.output.uri, config.storage)
    published = finish_interrupted(output, source.resolved_of(config).fingerprints.export)
    if published:
        manifest = Manifest.model_validate_json(published)
    else:
        manifest = make_and_publish(config, workspace, output, sign, reporter)
    result = result_of(config, manifest)
    if config.output.hub and result.reason is Reason.SUCCEEDED:
        push(config.output.hub, output, workspace, reporter)
    return result


def make_and_publish(
    config: RunConfig, workspace: Path, output: Folder, sign: Sign | None, reporter: Reporter
) -> Manifest:
    """Compute everything, and put it in the place of the former version."""
    inputs = fetch(config, output, workspace)
    fingerprint = source.resolved_of(config).fingerprints.export
    with Publication(output, fingerprint, reporter) as publication:
        manifest = make_all(Work(config, inputs, workspace, publication, reporter))
        files = publication.commit(lambda files: encoded(with_files(manifest, files)), sign)
    return with_files(manifest, files)


def make_all(work: Work) -> Manifest:
    """Make all files; returns the manifest but for their list."""
    config, inputs = work.config, work.inputs
    work.result.mkdir()
    add_folder(work.publication.add, inputs.adapter)
    work.publication.add(inputs.dataset_report, inputs.dataset_report.name)
    base, gate = None, GateReport()
    if config.export.merged or config.export.gguf:
        base = source.fetch_resolved(config, work.workspace / "model", work.reporter)
        gate = make_models(work, base)
    manifest = Manifest(
        fingerprint=source.resolved_of(config).fingerprints.export,
        files=(),
        created=now(),
        lineage=lineage_of(config, inputs.training),
        metrics=inputs.training.metrics.named(),
        gate=gate,
    )
    work.reporter.message("Writing model card and report")
    describe(work, base, manifest)
    return manifest


def make_models(work: Work, base: Path) -> GateReport:
    """Write the merged model and GGUF files, each of which is on its way when it is finished."""
    config, inputs = work.config, work.inputs
    check_memory()
    check_space(config, base, work.workspace)
    folder = (work.result if config.export.merged else work.workspace) / MERGED
    making = Making(
        config=config,
        tuned=put_together(config, base, inputs.adapter, folder),
        examples=inputs.examples,
        result=work.result,
        workspace=work.workspace,
        add=work.publication.add,
        reporter=work.reporter,
    )
    if config.export.merged:
        make_merged(making)
    return make_gguf(making) if config.export.gguf else GateReport()


def convert_merged(
    config: RunConfig, folder: Path, store: Folder, add: Add, reporter: Reporter
) -> GateReport:
    """GGUF files in `folder` of the model that lies merged there, on one machine."""
    with tempfile.TemporaryDirectory(prefix="gguf-", dir=folder) as workspace:
        making = Making(
            config=config,
            tuned=put_together(config, folder / MERGED, None, folder / MERGED),
            examples=fetch_examples(config, store, Path(workspace)),
            result=folder,
            workspace=Path(workspace),
            add=add,
            reporter=reporter,
        )
        return make_gguf(making)


def describe(work: Work, base: Path | None, manifest: Manifest) -> None:
    """Write model card and report of all files so far."""
    facts = Facts(
        config=work.config,
        lineage=manifest.lineage,
        trained=work.inputs.training,
        dataset=work.inputs.dataset,
        gate=manifest.gate,
        files=work.publication.artifacts,
        created=manifest.created,
        license=license_of(base),
    )
    for name, write in ((MODEL_CARD, write_model_card), (REPORT, write_report)):
        write(work.result / name, facts)
        work.publication.add(work.result / name, name)


def with_files(manifest: Manifest, files: tuple[Artifact, ...]) -> Manifest:
    """The whole manifest."""
    return manifest.model_copy(update={"files": files})


def encoded(manifest: Manifest) -> bytes:
    """As manifest.json holds it."""
    return manifest.model_dump_json(indent=2, exclude_none=True).encode() + b"\n"


def result_of(config: RunConfig, manifest: Manifest) -> StageResult:
    """What the stage came to; a file that the gate rejected fails it, though all others are out."""
    folder = config.output.uri.rstrip("/")
    said = explain_failures(manifest.gate, manifest.files, config.export)
    return StageResult(
        stage=Stage.EXPORT,
        reason=reason_of(manifest.files),
        message=" ".join(filter(None, [f"{len(manifest.files)} files in {folder}.", said])),
        artifacts=manifest.files,
        manifest_uri=f"{folder}/{MANIFEST}",
    )


def reason_of(files: Sequence[Artifact]) -> Reason:
    """Whether all files may be used."""
    bad = any(item.rejected for item in files)
    return Reason.QUALITY_GATE_FAILED if bad else Reason.SUCCEEDED
