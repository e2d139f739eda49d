"""The frozen formula of 0.1.0: what its own code computed, and the defaults of then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune_trainer.contract import Model, RunConfig, Storage
from finetune_trainer.model.base_model import former_folder_revision
from finetune_trainer.prepare.stored import former_fingerprints

LEAST: dict[str, Any] = {
    "model": {"source": "org/name"},
    "dataset": {"source": "s3://data/train.csv"},
    "output": {"uri": "s3://models/run"},
}
EVERYTHING: dict[str, Any] = {
    "model": {"source": "s3://models/base", "revision": "v1", "trustRemoteCode": True},
    "dataset": {
        "source": "s3://data/train.csv",
        "format": "csv",
        "columns": {
            "instruction": "q",
            "response": "a",
            "input": "more",
            "system": "who",
            "messages": "chat",
        },
        "systemPrompt": "Be a kettle.",
        "onInvalidRow": "skip",
        "maxInvalidRows": 3,
        "maxTruncatedRows": "20%",
        "evalFraction": 0.1,
        "evalSource": "s3://data/eval.csv",
    },
    "training": {
        "method": "qlora",
        "lora": {
            "r": 8,
            "alpha": 8,
            "dropout": 0,
            "targetModules": ["v_proj", "q_proj"],
            "useRslora": True,
            "useDora": True,
        },
        "epochs": "auto",
        "learningRate": 0.001,
        "batchSize": 1,
        "gradientAccumulationSteps": 2,
        "maxSequenceLength": 512,
        "warmupRatio": 0.1,
        "scheduler": "cosine",
        "weightDecay": 0.1,
        "packing": False,
        "gradientCheckpointing": "never",
        "minSequenceLength": 128,
        "evalSteps": 7,
        "earlyStopping": {"patience": 3, "minDelta": 0.1},
        "checkpointSteps": 9,
        "engine": "transformers",
        "parallelism": "ddp",
        "gpuMemory": "24Gi",
        "reportTo": ["wandb"],
        "seed": 7,
        "loggingSteps": 3,
    },
    "export": {
        "merged": False,
        "gguf": ["Q8_0", "F16"],
        "adapterGguf": True,
        "importanceMatrix": True,
        "verify": "warn",
        "qualityLimits": [{"quantization": "Q8_0", "maxKLDivergence": 0.5}],
        "signing": {},
    },
    "output": {"uri": "s3://models/run", "hub": {"repo": "org/tuned"}},
}


def prints(config: dict[str, Any], eval_etag: str | None = None) -> list[str]:
    read = RunConfig.model_validate(config)
    return list(former_fingerprints(read, "e1", "r1", eval_etag).model_dump().values())


def test_the_former_fingerprints_are_those_that_0_1_0_computed() -> None:
    assert prints(LEAST) == [
        "73984f46f8177380df8cdd4d86d099aa82953f0791582ce9fba5b79821566bfe",
        "c769843dff36de45c6b47de4e2cb19793acfb699e39cd1765f15a62ba2dc7981",
        "6bc81b99cd8bd521d50a4b3c1d3ef5c875910ddcd19c721feccea1599a61550e",
    ]
    assert prints(EVERYTHING, "e2") == [
        "3f2a8f9226263f8103077d18ee793a28428dc0610301d8a5522046c94892b091",
        "a9ec5f40d096e31a96819f07bb581925364abb9229fce9c8e05050d0ec72e18b",
        "1470013e74bcc2793f5371449b61e22d313dc432462c2b2b7eebd1ccb4eb542a",
    ]


def test_the_defaults_are_those_of_0_1_0() -> None:
    """A default left the formula out. When one changes, the formula has to name the former one."""
    config = RunConfig.model_validate(LEAST)
    found = {
        part: getattr(config, part).model_dump(mode="json")
        for part in ("model", "dataset", "training", "export")
    }
    assert _same_keys(found, DEFAULTS) == DEFAULTS


def _same_keys(found: Any, wanted: Any) -> Any:
    """Without fields that came later."""
    if not isinstance(wanted, dict):
        return found
    return {key: _same_keys(found[key], value) for key, value in wanted.items()}


DEFAULTS: dict[str, Any] = {
    "model": {"source": "org/name", "revision": "main", "trustRemoteCode": False},
    "dataset": {
        "source": "s3://data/train.csv",
        "format": "auto",
        "columns": {
            "instruction": "instruction",
            "response": "response",
            "input": None,
            "system": None,
            "messages": None,
        },
        "systemPrompt": None,
        "onInvalidRow": "fail",
        "maxInvalidRows": "10%",
        "maxTruncatedRows": "10%",
        "evalFraction": 0.05,
        "evalSource": None,
    },
    "training": {
        "method": "lora",
        "lora": {
            "r": 16,
            "alpha": 32,
            "dropout": 0.05,
            "targetModules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "useRslora": False,
            "useDora": False,
        },
        "epochs": 3,
        "learningRate": 2e-4,
        "batchSize": 2,
        "gradientAccumulationSteps": 4,
        "maxSequenceLength": 2048,
        "warmupRatio": 0.03,
        "scheduler": "linear",
        "weightDecay": 0.0,
        "packing": True,
        "minSequenceLength": None,
        "evalSteps": None,
        "earlyStopping": None,
        "engine": "auto",
        "seed": 42,
    },
    "export": {
        "merged": True,
        "gguf": ["F16", "Q8_0", "Q4_K_M"],
        "adapterGguf": None,
        "importanceMatrix": False,
        "verify": "fail",
        "qualityLimits": [],
        "signing": None,
    },
}


def test_the_former_revision_of_a_mounted_folder(tmp_path: Path) -> None:
    """As the code of 0.1.0 computed it: large files sampled, each .txt in it, the card not."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "LICENSE.txt").write_text("free")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * (8 << 12))
    (tmp_path / "code.py").write_text("pass")
    (tmp_path / "README.md").write_text("x")
    assert former_folder_revision(Model(source=str(tmp_path)), Storage()) == (
        "sha256:7e2fafb5a8a9ee0a74b037436ab94bc263dfb21386861e64a14a5351425d1ccb"
    )
    trusted = Model(source=str(tmp_path), trust_remote_code=True)
    assert former_folder_revision(trusted, Storage()) == (
        "sha256:e9c44622e3d2d5a3b641430718bdd51d45d88fbd29bcf81743e6919b15d758fc"
    )
