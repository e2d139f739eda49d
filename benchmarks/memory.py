"""Predicted and measured memory of a training on this machine's CPU.

    python -m benchmarks.memory [--quick]

Each line is a training of two steps by the recipe, in a process of its own that the kernel tells
the peak of its resident memory (VmHWM). docs/memory.md keeps the figures of the last run.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch, whose threads a fork does not copy

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from examples.base_model import smollm2
from finetune_trainer.contract import RunConfig, Training, TrainingPlan
from finetune_trainer.memory.predict import Recipe, predict
from finetune_trainer.model import ModelFolder, loading
from finetune_trainer.model.loading import compute_dtype
from finetune_trainer.model.shape import Shape
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.train.link import TrainingWork
from finetune_trainer.train.recipe import sft

WORDS = "the kettle whistles when the water boils and stops when it is lifted "
ALL_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    model: str
    batch: int
    tokens: int
    """Of each row."""

    training: dict[str, Any]
    quick: bool = False
    bfloat16: bool = True
    """Where the processor has the instructions; otherwise, and without them, float32."""


CASES = [
    Case("smollm2-135m", 1, 128, {}, quick=True),
    Case("smollm2-135m", 4, 256, {}),
    Case("smollm2-135m", 8, 256, {}, quick=True),
    Case("smollm2-135m", 2, 1024, {}),
    Case("smollm2-135m", 4, 256, {"gradientCheckpointing": "always"}),
    Case("smollm2-135m", 4, 256, {"lora": {"dropout": 0, "targetModules": ALL_LAYERS}}),
    Case("smollm2-135m", 4, 256, {"packing": False}),
    Case("smollm2-135m", 2, 256, {"method": "qlora"}),
    Case("smollm2-135m", 4, 256, {}, bfloat16=False),
    Case("smollm2-135m", 1, 128, {"method": "full"}),
    Case("smollm2-135m", 4, 256, {"method": "full"}),
    Case("smollm2-135m", 4, 256, {"method": "full"}, bfloat16=False),
    Case("llama-0.5b", 1, 256, {}),
    Case("llama-0.5b", 2, 256, {}),
    Case("llama-0.5b", 1, 256, {}, bfloat16=False),
    Case("llama-1.1b", 1, 128, {}),
]


def model_folder(name: str, folder: Path) -> Path:
    """SmolLM2, or a Llama of that size with random weights and its tokenizer."""
    if name == "smollm2-135m":
        return smollm2()
    target = folder / name
    if target.exists():
        return target
    wide = name == "llama-1.1b"
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=2048 if wide else 1280,
        intermediate_size=5632 if wide else 3584,
        num_hidden_layers=22 if wide else 24,
        num_attention_heads=32 if wide else 20,
        num_key_value_heads=4 if wide else 5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)  # type: ignore[no-untyped-call] # transformers has no type
    torch.nn.Module.to(model, torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(smollm2()).save_pretrained(target)
    return target


def work_for(case: Case, model: Path, workdir: Path) -> TrainingWork:
    """Two steps of rows that are cut off at `tokens`; in one of them a short row that ends."""
    examples = workdir / "examples.jsonl"
    rows = [(f"Row {n}?", WORDS * (case.tokens // 12 + 2)) for n in range(2 * case.batch - 1)]
    with examples.open("w", encoding="utf-8") as stream:
        for question, answer in [*rows, ("And?", "It stops.")]:
            row = {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": answer}],
            }
            stream.write(json.dumps(row) + "\n")
    config = RunConfig.model_validate(
        {
            "model": {"source": str(model)},
            "dataset": {"source": str(examples)},
            "training": {"epochs": 1, **case.training},
            "output": {"uri": str(workdir)},
        }
    )
    return TrainingWork(
        config=config,
        plan=TrainingPlan(
            batch_size=case.batch,
            gradient_accumulation_steps=1,
            gradient_checkpointing=config.training.gradient_checkpointing == "always",
        ),
        max_sequence_length=case.tokens,
        engine="transformers",
        examples=examples,
        held_out=None,
        model=ModelFolder(model),
        workdir=workdir,
    )


def measure(work: TrainingWork, dtype: torch.dtype) -> int:
    """Bytes that a process which trains has resident at its peak."""
    end, begin = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            vars(loading)["compute_dtype"] = lambda: dtype  # as another processor would have it
            sft.fine_tune(work, Reporter())
            os.write(begin, str(peak()).encode())
            status = 0
        finally:
            os._exit(status)  # nothing of the parent's is to be tidied up here
    os.close(begin)
    with os.fdopen(end) as answer:
        found = answer.read()
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit(f"{work.plan} failed")
    return int(found)


def peak() -> int:
    """Bytes of this process's resident memory at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def dtype_of(case: Case) -> torch.dtype:
    return compute_dtype() if case.bfloat16 else torch.float32


def predicted(case: Case, model: Path) -> int:
    """Bytes that the planner would expect."""
    # All of them are Llamas, whose widths can be read.
    shape = cast("Shape", Shape.from_config(json.loads((model / "config.json").read_text())))
    training = Training.model_validate(case.training)
    checkpointing = training.gradient_checkpointing == "always"
    sixteen = dtype_of(case) is torch.bfloat16
    recipe = Recipe.on_cpu(training, checkpointing=checkpointing, half=sixteen)
    return predict(shape, recipe, case.batch * case.tokens).total


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two small cases")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    out = sys.stdout
    out.write("| model | batch x tokens | training | predicted | measured | error |\n")
    out.write("| --- | --- | --- | --- | --- | --- |\n")
    with tempfile.TemporaryDirectory(prefix="memory-") as name:
        for number, case in enumerate(CASES):
            if options.quick and not case.quick:
                continue
            workdir = Path(name) / str(number)
            workdir.mkdir()
            model = model_folder(case.model, Path(name))
            expected, found = (
                predicted(case, model),
                measure(work_for(case, model, workdir), dtype_of(case)),
            )
            what = json.dumps(case.training) if case.training else "defaults"
            what += f", {dtype_of(case)}".replace("torch.", "")
            out.write(
                f"| {case.model} | {case.batch} x {case.tokens} | {what} "
                f"| {expected / 2**20:,.0f} MiB | {found / 2**20:,.0f} MiB "
                f"| {expected / found - 1:+.1%} |\n"
            )
            out.flush()


if __name__ == "__main__":
    main()
