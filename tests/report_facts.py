"""An export as it really looks, for tests of its report: 60 steps, four files, ten answers."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from finetune_trainer.contract import (
    Artifact,
    DatasetReport,
    FileVerdict,
    Fingerprints,
    GateReport,
    Lineage,
    Notice,
    NoticeCode,
    Quality,
    Quantization,
    RunConfig,
    Sample,
    Training,
    TrainingRecord,
)
from finetune_trainer.export.report import Facts
from finetune_trainer.prepare.findings import histogram, spread

ROW_COUNT, LIMIT = 480, 512
QUALITIES = {
    # type: megabytes, KL divergence, limit, same top token, perplexity
    Quantization.F16: (2480, 0.000021, 0.001, 0.9983, 6.124),
    Quantization.Q8_0: (1318, 0.00141, 0.005, 0.9781, 6.131),
    Quantization.Q4_K_M: (808, 0.0347, 0.08, 0.9204, 6.312),
    Quantization.Q3_K_M: (691, 0.2113, 0.15, 0.8357, 7.544),
}
ANSWERS = json.loads((Path(__file__).parent / "data/report/answers.json").read_bytes())


def config(**changes: Any) -> RunConfig:
    """run.json; `changes` replace its parts."""
    raw: dict[str, Any] = {
        "job": {"name": "support-bot", "namespace": "models"},
        "model": {"source": "meta-llama/Llama-3.2-1B-Instruct"},
        "dataset": {"source": "s3://company-data/support/tickets-2026.csv", "evalFraction": 0.1},
        "training": {"maxSequenceLength": LIMIT, "learningRate": 3e-4},
        "output": {"uri": "s3://company-models/support-bot"},
        "storage": {"endpoint": "https://minio.internal.example:9000"},
    }
    return RunConfig.model_validate({**raw, **changes})


def lineage(**changes: Any) -> Lineage:
    made = Lineage(
        dataset="s3://company-data/support/tickets-2026.csv",
        dataset_etag="9b2cf535f27731c974343645a3985328",
        dataset_rows=429,
        columns={"instruction": "question", "response": "reply"},
        model="meta-llama/Llama-3.2-1B-Instruct",
        model_revision="sha256:" + "5a" * 32,
        model_commit="9213176726f574b556790deb65791e0c5aa438b6",
        hyperparameters={},
        fingerprints=Fingerprints(
            prepare=digest("prepare"), train=digest("train"), export=digest("export")
        ),
        versions={"python": "3.11.2", "torch": "2.13.0+cpu", "transformers": "5.17.0"},
    )
    return made.model_copy(update=changes)


def trained(**changes: Any) -> dict[str, Any]:
    noise = np.random.default_rng(7)
    history: list[dict[str, float]] = [{"step": 0.0, "epoch": 0.0, "eval_loss": 3.2011}]
    for step in range(1, 61):
        loss = 1.55 + 1.75 * math.exp(-step / 14) + float(noise.normal(0, 0.06))
        history.append({"step": step, "epoch": step / 20, "loss": loss, "learning_rate": 2e-4})
        if step in (20, 40, 60):
            history.append({"step": step, "eval_loss": {20: 2.1, 40: 1.8124, 60: 1.845}[step]})
    notice = Notice(
        code=NoticeCode.OVERFITTING,
        step=60,
        evidence="held-out loss 1.8124 at step 40, 1.8450 now, while the training loss fell by 8%",
        remedy="Train fewer epochs, or set training.earlyStopping.",
    )
    effective = Training(max_sequence_length=LIMIT, learning_rate=3e-4)
    return {
        "metrics": {
            "trainLoss": 1.9113,
            "finalLoss": 1.571,
            "trainRuntimeSeconds": 2531.0,
            "trainSteps": 60.0,
            "trainTokens": 158_211.0,
            "tokensPerSecond": 65.4,
            "baseEvalLoss": 3.2011,
            "basePerplexity": 24.559,
            "evalLoss": 1.845,
            "perplexity": 6.3281,
            "evalTokens": 3120.0,
            "trainableParameters": 3_407_872.0,
            "baseParameters": 1_235_814_400.0,
        },
        "hyperparameters": effective.model_dump(mode="json"),
        "notices": [notice.model_dump(mode="json")],
        "history": history,
    } | changes


def dataset_report(**changes: Any) -> dict[str, Any]:
    drawn = np.random.default_rng(3).lognormal(4.9, 0.62, ROW_COUNT)
    lengths = drawn.astype(np.uint32)
    bins = histogram(np.minimum(lengths, LIMIT))
    return {
        "source": "s3://company-data/support/tickets-2026.csv",
        "etag": "9b2cf535f27731c974343645a3985328",
        "detected": {
            "format": "csv",
            "encoding": "utf-8",
            "layout": "instruction",
            "columns": {"instruction": "question", "response": "reply"},
        },
        "rows": 486,
        "invalid": 3,
        "examples": 429,
        "evalExamples": 51,
        "duplicates": {"count": 4, "rows": [17, 80, 81, 304]},
        "maxSequenceLength": LIMIT,
        "truncated": {"count": int((lengths > LIMIT).sum()), "rows": [12]},
        "leftOut": {"count": 0, "rows": []},
        "tokens": spread(lengths),
        "answerTokens": spread(lengths // 3),
        "tokensAfterCutting": 80_000,
        "histogram": [[bin_.up_to, bin_.rows] for bin_ in bins],
        "invalidRows": [{"row": 9, "cause": "the column reply is empty"}],
    } | changes


def gate(**changes: Any) -> GateReport:
    """What the gate measured: three good files and one over its limit."""
    files = []
    for kind, (_, divergence, limit, same, perplexity) in QUALITIES.items():
        passed = divergence <= limit
        quality = Quality(
            kl_divergence=divergence,
            same_top_token=same,
            perplexity=perplexity,
            max_kl_divergence=limit,
            passed=passed,
        )
        problem = f"mean KL divergence {divergence} is over its limit of {limit}"
        problems = () if passed else (problem,)
        files.append(
            FileVerdict(file=name(kind), quantization=kind, quality=quality, problems=problems)
        )
    samples = tuple(Sample(**answer, stopped=number != 8) for number, answer in enumerate(ANSWERS))
    report = GateReport(
        rows=32,
        tokens=2048,
        base_perplexity=24.31,
        tuned_perplexity=6.12,
        files=tuple(files),
        samples=samples,
    )
    return report.model_copy(update=changes)


def artifacts() -> tuple[Artifact, ...]:
    """What lies in the output folder."""
    sizes = {
        "Modelfile": 1203,
        "adapter/adapter_config.json": 911,
        "adapter/adapter_model.safetensors": 13_648_688,
        "dataset-report.json": 8120,
        "gguf/Llama-3.2-1B-Instruct-LoRA-F32.gguf": 13_650_080,
        "merged/config.json": 877,
        "merged/model-00001-of-00001.safetensors": 2_471_645_608,
        "merged/tokenizer.json": 17_209_920,
    }
    for kind, (megabytes, divergence, limit, *_) in QUALITIES.items():
        folder = "gguf" if divergence <= limit else "rejected"
        sizes[f"{folder}/{name(kind)}"] = megabytes * 1_000_000
    return tuple(
        Artifact(path=path, bytes=count, sha256=digest(path)) for path, count in sizes.items()
    )


def name(kind: Quantization) -> str:
    return f"Llama-3.2-1B-Instruct-{kind.value}.gguf"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def facts(**changes: Any) -> Facts:
    """All of it; `changes` replace fields of Facts, two of them as the JSON that stages left."""
    given: dict[str, Any] = {
        "config": config(),
        "lineage": lineage(),
        "trained": trained(),
        "dataset": dataset_report(),
        "gate": gate(),
        "files": artifacts(),
        "created": "2026-11-24T13:37:00Z",
        "license": "llama3.2",
    } | changes
    given["trained"] = TrainingRecord.model_validate(given["trained"])
    given["dataset"] = DatasetReport.model_validate(given["dataset"])
    return Facts(**given)
