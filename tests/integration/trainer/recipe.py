"""The recipe's parts on given rows, for its tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from finetune_trainer.contract import Example, Objective, RunConfig
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.tokenizer import load_tokenizer
from finetune_trainer.train.link import TrainingWork, default_plan
from finetune_trainer.train.recipe import sft
from finetune_trainer.train.recipe.data import TokenizedRows, tokenize
from finetune_trainer.train.recipe.packing import prepare_packing
from finetune_trainer.train.recipe.trainer import RecipeTrainer, TrainingData

Conversations = Sequence[Example]


def make_work(
    model: Path,
    workdir: Path,
    rows: Conversations,
    held_out: Conversations | None = None,
    **settings: Any,
) -> TrainingWork:
    """What a worker is told, with its files."""
    config = RunConfig.model_validate(
        {
            "model": {"source": str(model)},
            "dataset": {"source": "/data/train.csv"},
            "output": {"uri": str(workdir)},
            "training": settings,
        }
    )
    return TrainingWork(
        config=config,
        plan=default_plan(config),
        max_sequence_length=config.training.max_sequence_length,
        engine="transformers",
        examples=write(workdir / "examples.jsonl", rows),
        held_out=write(workdir / "eval.jsonl", held_out) if held_out else None,
        model=ModelFolder(model),
        workdir=workdir,
    )


def write(file: Path, rows: Conversations) -> Path:
    """Conversations as `prepare` leaves them."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def tokenized(
    model: Path,
    workdir: Path,
    rows: Conversations,
    length: int = 2048,
    objective: Objective = "sft",
) -> TokenizedRows:
    """Conversations as the recipe reads them."""
    file = write(workdir / "examples.jsonl", rows)
    tokenizer = load_tokenizer(ModelFolder(model))
    return tokenize(file, tokenizer, length, workdir / "tokens", objective)


def base_of(trainer: RecipeTrainer) -> PreTrainedModel:
    """The model under the adapter."""
    return cast("PreTrainedModel", cast("PeftModel", trainer.model).get_base_model())


def build(
    model: Path,
    workdir: Path,
    rows: Conversations,
    held_out: Conversations | None = None,
    pass_tokens: int | None = None,
    **settings: Any,
) -> RecipeTrainer:
    """The trainer before it trains: float32, no dropout, one epoch."""
    defaults = {"epochs": 1, "lora": {"dropout": 0}}
    work = make_work(model, workdir, rows, held_out, **{**defaults, **settings})
    plan = work.plan.model_copy(update={"pass_tokens": pass_tokens})
    return build_from(work.model_copy(update={"plan": plan}))


def build_from(work: TrainingWork) -> RecipeTrainer:
    """The trainer of a work, in float32 and of one epoch."""
    tokenizer = load_tokenizer(work.model)
    examples, others = sft.read_rows(work, tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(work.model.path, dtype=torch.float32)
    packed = work.config.training.packing and prepare_packing(loaded)
    return sft.build_trainer(
        loaded,
        tokenizer,
        TrainingData(examples, others, packed=packed),
        work=work,
        epochs=1,
    )
