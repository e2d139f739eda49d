"""What benchmarks.train runs in processes of their own.

    python -m benchmarks.train_steps rows|plain|ours|judge FOLDER

The folder has request.json; `plain`, `ours` and `judge` leave what they measured beside it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks import texts
from benchmarks.plain_script import UnfusedTrainer, guide_arguments, guide_lora
from examples.base_model import smollm2
from finetune_trainer.contract import Example, Hardware, RunConfig, TrainingPlan
from finetune_trainer.memory.plan import Lengths, plan
from finetune_trainer.model import ModelFolder, loading
from finetune_trainer.model.shape import Shape
from finetune_trainer.model.tokenizer import encode, load_tokenizer
from finetune_trainer.runtime.lifecycle import set_up_libraries
from finetune_trainer.train.link import TrainingWork
from finetune_trainer.train.recipe import sft
from finetune_trainer.train.recipe.packing import prepare_packing
from finetune_trainer.train.recipe.trainer import TrainingData

LONGEST, FIXED = 1024, 256  # tokens
SETTINGS: dict[str, Any] = {"epochs": 1, "maxSequenceLength": LONGEST}


def main(step: str, folder: Path) -> None:
    asked = json.loads((folder / "request.json").read_text())
    if step == "rows":
        _rows(folder, asked["kind"], asked["rows"], asked["heldOut"])
        return
    if step != "plain":
        set_up_libraries()  # the log; a plain script has none of ours
    result: dict[str, Any]
    if step == "judge":
        result = {"eval_loss": _judge(folder)}
    else:
        train = _plain if step == "plain" else partial(_ours, batch_size=asked["batchSize"])
        result = asdict(train(folder, float32=asked["float32"]))
    (folder / f"{step}.json").write_text(json.dumps(result))


def _rows(folder: Path, kind: str, rows: int, held_out: int) -> None:
    """Write examples.jsonl, eval.jsonl and the length of the longest row."""
    tokenizer = load_tokenizer(ModelFolder(smollm2()))

    def count(row: Example) -> int:
        return len(encode(tokenizer, row)[0])

    make = texts.variable if kind == "variable" else texts.fixed
    found = make(rows + held_out, count, LONGEST if kind == "variable" else FIXED)
    lengths = sorted(count(row) for row in found[:rows])
    print(
        f"{kind:9} {rows} rows, {sum(lengths)} tokens, median {lengths[rows // 2]}, "
        f"longest {lengths[-1]}; {held_out} rows held out"
    )
    (folder / "longest").write_text(str(lengths[-1]))
    for name, part in (("examples", found[:rows]), ("eval", found[rows:])):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


@dataclass(frozen=True)
class Trained:
    """What the process that trains can tell."""

    tokens: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def _timed(train: Any, tokens: int) -> Trained:
    def cpu() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    began, began_cpu = time.monotonic(), cpu()
    train()
    seconds, cpu_seconds = time.monotonic() - began, cpu() - began_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Trained(tokens, seconds, cpu_seconds, peak)


def _ours(folder: Path, batch_size: int | None, *, float32: bool) -> Trained:
    config = RunConfig.model_validate(
        {
            "model": {"source": str(smollm2())},
            "dataset": {"source": "/data/train.csv"},
            "output": {"uri": "/out"},
            "training": SETTINGS,
        }
    )
    workdir = folder / "ours"
    workdir.mkdir(exist_ok=True)
    training = config.training
    hardware = Hardware(memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    shape = cast("Shape", Shape.from_config(json.loads((smollm2() / "config.json").read_bytes())))
    longest = int((folder / "longest").read_text())
    chosen = plan(training, shape, Lengths(longest), hardware)
    if batch_size:
        effective = training.batch_size * training.gradient_accumulation_steps
        chosen = TrainingPlan(
            batch_size=batch_size,
            gradient_accumulation_steps=effective // batch_size,
            gradient_checkpointing=False,
        )
    work = TrainingWork(
        config=config,
        plan=chosen,
        max_sequence_length=LONGEST,
        engine="transformers",
        examples=folder / "examples.jsonl",
        held_out=None,
        model=ModelFolder(smollm2()),
        workdir=workdir,
    )
    loading.use_available_cpus()
    tokenizer = load_tokenizer(work.model)
    examples, _ = sft.read_rows(work, tokenizer)
    dtype = torch.float32 if float32 else loading.compute_dtype()
    model = loading.load_model(work.model, dtype, "cpu")
    data = TrainingData(examples, None, packed=prepare_packing(model))
    trainer = sft.build_trainer(model, tokenizer, data, work=work, epochs=1)
    measured = _timed(trainer.train, examples.tokens)
    sft.save_result(trainer, tokenizer, work)
    return measured


def _plain(folder: Path, *, float32: bool) -> Trained:
    file = str(folder / "examples.jsonl")
    numbers = {"bf16": False} if float32 else {}
    trainer = UnfusedTrainer(
        model=str(smollm2()),
        args=guide_arguments(folder / "plain", max_length=LONGEST, use_cpu=True, **numbers),
        train_dataset=load_dataset("json", data_files=file, split="train", cache_dir=str(folder)),
        peft_config=guide_lora(),
    )
    tokenized = cast("Dataset", trainer.train_dataset)
    tokens = sum(len(ids) for ids in tokenized["input_ids"])
    measured = _timed(trainer.train, tokens)
    trainer.save_model(str(folder / "adapter"))
    return measured


def _judge(folder: Path) -> float:
    tokenizer = load_tokenizer(ModelFolder(smollm2()))
    base = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    total, labels = 0.0, 0
    for line in (folder / "eval.jsonl").read_text(encoding="utf-8").splitlines():
        ids, targets = (torch.tensor([part]) for part in encode(tokenizer, json.loads(line)))
        count = int((targets[:, 1:] >= 0).sum())
        with torch.no_grad():
            total += model(input_ids=ids, labels=targets).loss.item() * count
        labels += count
    return total / labels


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
