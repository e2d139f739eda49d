"""export: merge, convert, quantize, ask each file a question, publish with the manifest last."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

from finetune_trainer.base_model import source
from finetune_trainer.base_model.tokenizer import begins_with_bos, load_tokenizer
from finetune_trainer.config import Quantization, RunConfig, Stage
from finetune_trainer.export.gguf.convert import Model
from finetune_trainer.export.gguf.files import write_files
from finetune_trainer.export.manifest import build, publish
from finetune_trainer.export.merge import merge, parameters_dtype
from finetune_trainer.export.modelfile import write_modelfile
from finetune_trainer.export.preflight import check_space
from finetune_trainer.export.verify import Check, verify
from finetune_trainer.marker import MANIFEST, METRICS, describe_tree, stage_folder
from finetune_trainer.outcome import Reason, StageResult
from finetune_trainer.progress import Reporter
from finetune_trainer.storage import Folder, open_folder

REPORT = "dataset-report.json"


def run(config: RunConfig, workspace: Path, reporter: Reporter) -> StageResult:
    """Make the artifacts for `config.resolved`; raises StageError."""
    reporter.begin(Stage.EXPORT, "Fetching the adapter")
    resolved = source.resolved_of(config)
    output = open_folder(config.output.uri, config.storage)
    result = workspace / "result"
    example, trained = fetch_inputs(config, output, workspace, result)
    checks: list[Check] = []
    if config.export.merged or config.export.gguf:
        checks = make_models(config, workspace, result, example, reporter)

    reporter.message("Computing checksums")
    files = describe_tree(result)
    manifest = build(config, resolved, files, trained, checks)
    total = sum(item.bytes for item in files)
    publish(output, manifest, result, reporter.transfer(f"Uploading {len(files)} files", total))
    return StageResult(
        stage=Stage.EXPORT,
        reason=Reason.SUCCEEDED,
        message=f"{len(files)} files in {config.output.uri}",
        artifacts=tuple(files),
        manifest_uri=output.uri_of(MANIFEST),
    )


def fetch_inputs(
    config: RunConfig, output: Folder, workspace: Path, result: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Bring adapter and report into the result; return an example and what `train` measured."""
    prints = source.resolved_of(config).fingerprints
    prepared = stage_folder(Stage.PREPARE, prints.prepare)
    trained = stage_folder(Stage.TRAIN, prints.train)
    output.download_tree(f"{trained}/adapter", result / "adapter")
    output.download(f"{trained}/{METRICS}", workspace / METRICS)
    output.download(f"{prepared}/{REPORT}", result / REPORT)
    examples = workspace / "examples.jsonl"
    output.download(f"{prepared}/examples.jsonl", examples)
    with examples.open(encoding="utf-8") as lines:
        return json.loads(next(lines)), json.loads((workspace / METRICS).read_bytes())


def make_models(
    config: RunConfig, workspace: Path, result: Path, example: dict[str, Any], reporter: Reporter
) -> list[Check]:
    """Write the merged model, GGUF files and Modelfile below `result`; check each GGUF file."""
    trust = config.model.trust_remote_code
    merged = result / "merged" if config.export.merged else workspace / "merged"
    base = source.fetch_resolved(config, workspace / "model", reporter)
    check_space(config, base, workspace)
    reporter.message("Merging adapter and base model")
    merge(base, result / "adapter", merged, trust_remote_code=trust)
    shutil.rmtree(workspace / "model", ignore_errors=True)
    gc.collect()
    if not config.export.gguf:
        return []
    return make_gguf(config, merged, result, example, reporter)


def make_gguf(
    config: RunConfig, merged: Path, result: Path, example: dict[str, Any], reporter: Reporter
) -> list[Check]:
    """Write `gguf/` and the Modelfile below `result`, and check each GGUF file."""
    trust = config.model.trust_remote_code
    tokenizer = load_tokenizer(merged, trust_remote_code=trust)
    bf16 = parameters_dtype(merged) == "bfloat16"
    model = Model(
        base=merged,
        adapter=None,
        folder=merged,
        name=source.display_name(config.model.source),
        own=Quantization.BF16 if bf16 else Quantization.F16,
        begins_with_bos=begins_with_bos(tokenizer),
        trust_remote_code=trust,
    )
    files = list(write_files(model, result / "gguf", config.export.gguf, reporter=reporter))
    checks = []
    for file in files:
        reporter.message(f"Asking {file.name} a question")
        checks.append(verify(file, tokenizer, example))
    write_modelfile(result, files, tokenizer, config, merged=merged)
    return checks
