"""Each family of models that people fine-tune, from rows to GGUF files that llama.cpp reads alike.

Tiny models with random weights (families.py) go through the real stages. What comes out is looked
at from outside: transformers on the merged model against llama.cpp on the GGUF files.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_trainer.model.rendering import render
from finetune_trainer.model.tokenizer import encode, message_pair
from tests.integration.trainer.conftest import ATTENTION, MLP, ROWS, Processes, write_csv
from tests.integration.trainer.families import EACH_CHANGE, FAMILIES, write_family
from tests.integration.trainer.fork_server import ForkServer
from tests.integration.trainer.narrow import to_fp8, to_mxfp4

KINDS = ("F16", "Q8_0", "Q4_K_M")
SECONDS = 300.0
PLAIN = {"r": 8, "dropout": 0}
NARROW: dict[str, Callable[[Path, Path], Path]] = {
    "gpt-oss": to_mxfp4,
    "qwen3-moe": partial(to_fp8, block=(16, 16)),
}
"""Families whose base models are published in fewer than 16 bits."""
FUSED = ("o_proj", "qkv_proj")


@dataclass(frozen=True)
class Finished:
    base: Path
    output: Path
    """The only version's folder."""

    log: str

    @property
    def merged(self) -> Path:
        return self.output / "merged"

    def gguf(self, kind: str) -> Path:
        return self.output / "gguf" / f"{self.base.name}-{kind}.gguf"


@dataclass(frozen=True)
class Pipeline:
    """Runs all stages on a model of a family."""

    server: ForkServer
    folder: Path

    def __call__(self, name: str, lora: dict[str, Any], **export: Any) -> Finished:
        """Train `name` with an adapter like that, and export it."""
        base = self.folder / name / "base"  # llama.cpp must not need the family's name
        if not base.exists():
            write_family(FAMILIES[name], base)
            if narrow := NARROW.get(name):
                narrow(base, base.with_name("narrow"))
                shutil.rmtree(base)
                base.with_name("narrow").rename(base)
        folder = self.folder / f"run-{len(list(self.folder.iterdir()))}"
        output, log = folder / "out", folder / "log"
        write = folder / "train.csv"
        folder.mkdir()
        write_csv(write)
        config = {
            "model": {"source": str(base)},
            "dataset": {"source": str(write)},
            "training": {
                "epochs": 8,
                "learningRate": 0.01,
                "gradientAccumulationSteps": 1,
                "lora": {**PLAIN, **lora},
            },
            "export": {"gguf": list(KINDS), **export},
            "output": {"uri": str(output)},
        }
        (folder / "run.json").write_text(json.dumps(config))
        log.touch()
        command = ["run", f"--config={folder / 'run.json'}", f"--workspace={folder / 'workspace'}"]
        home = {"HOME": str(folder), "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1"}
        pid = self.server.start(command, {**os.environ, **home}, log)
        deadline = time.monotonic() + SECONDS
        while (status := self.server.poll(pid)) is None:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        assert status == 0, log.read_text()
        (version,) = (output / "versions").iterdir()
        return Finished(base, version, log.read_text())


@pytest.fixture(scope="module")
def pipeline(processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline(processes.server, tmp_path_factory.mktemp("families"))


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.double(), dim=-1)


@torch.no_grad()
def by_transformers(folder: Path, ids: list[int]) -> torch.Tensor:
    """Logarithms of the next token's probabilities [tokens, vocabulary], in float32."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model.eval()  # type: ignore[no-untyped-call] # transformers
    return log_probabilities(model(torch.tensor([ids])).logits[0])


def by_llama_cpp(file: Path, text: str) -> tuple[list[int], torch.Tensor]:
    """The text's tokens, and the same logarithms."""
    model = llama_cpp.Llama(
        str(file), n_ctx=96, n_batch=96, logits_all=True, n_threads=1, verbose=False
    )
    try:
        ids = model.tokenize(text.encode(), add_bos=False, special=True)
        model.eval(ids)
        return list(ids), log_probabilities(torch.from_numpy(np.array(model.scores[: len(ids)])))
    finally:
        model.close()


def divergence(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence in nats per token."""
    width = min(one.shape[-1], other.shape[-1])  # rows of the embeddings that are no tokens
    one, other = one[..., :width], other[..., :width]
    return float((one.exp() * (one - other)).sum(-1).mean())


def check(run: Finished) -> None:
    """llama.cpp reads and computes what transformers does, and the training made a difference."""
    trained = AutoTokenizer.from_pretrained(run.base)
    pair = message_pair(*ROWS[0])
    text = render(trained, [*pair["prompt"], *pair["completion"]])
    ids, _ = encode(trained, pair)
    for folder in (run.merged, run.output / "adapter"):
        assert encode(AutoTokenizer.from_pretrained(folder), pair)[0] == ids
    settings = [
        json.loads((f / "tokenizer_config.json").read_text()) for f in (run.base, run.merged)
    ]
    assert settings[0]["tokenizer_class"] == settings[1]["tokenizer_class"]
    tuned = by_transformers(run.merged, ids)
    assert divergence(tuned, by_transformers(run.base, ids)) > 0.1

    tokens, exact = by_llama_cpp(run.gguf("F16"), text)
    assert tokens == ids
    assert divergence(tuned, exact) < 1e-3
    first, second = tuned.topk(2).values.T
    clear = first - second > 0.02  # random weights put some tokens level
    assert torch.equal(tuned.argmax(-1)[clear], exact.argmax(-1)[clear])
    losses = [divergence(tuned, by_llama_cpp(run.gguf(kind), text)[1]) for kind in KINDS]
    assert losses == sorted(losses), "the smaller the type, the more is lost"


LORA: dict[str, dict[str, Any]] = {
    "llama-3.2": {"useRslora": True, "r": 32},
    "mistral": {"useDora": True},
    "phi-4": {"targetModules": [*ATTENTION, *MLP]},
}
"""Adapters of other kinds, for some."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in EACH_CHANGE else pytest.mark.every_family)
        for name in FAMILIES
    ],
)
def test_a_family_comes_out_as_it_was_trained(pipeline: Pipeline, name: str) -> None:
    run = pipeline(name, LORA.get(name, {}))
    assert not (run.output / "rejected").exists()
    adapter = json.loads((run.output / "adapter" / "adapter_config.json").read_text())
    fused = FAMILIES[name].kind == "phi3"
    layers = FUSED if fused else ATTENTION
    if name == "phi-4":
        layers = (*FUSED, "gate_up_proj", "down_proj")
    assert sorted(adapter["target_modules"]) == sorted(layers)
    assert ("The model fuses layers: the adapter goes to qkv_proj for q_proj" in run.log) is fused
    assert (run.output / "Modelfile").read_text().count("\nTEMPLATE ") == 1
    check(run)
    assert run.gguf("LoRA-F32").exists() is (name != "mistral"), "DoRA has no file of its own"
    gate = json.loads((run.output / "manifest.json").read_text())["gate"]
    assert not any(file.get("problems") for file in gate["files"])
