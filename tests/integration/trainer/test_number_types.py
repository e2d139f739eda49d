"""Where the hardware has no bfloat16, a training computes in float16 with scaled gradients.

On a CPU accelerate offers no scaler, so these tests put PyTorch's own one in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune_trainer.contract import Notice, Reason, StageError
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.tokenizer import load_tokenizer
from finetune_trainer.train.link import TrainingWork
from finetune_trainer.train.recipe import sft
from finetune_trainer.train.recipe.packing import prepare_packing
from finetune_trainer.train.recipe.trainer import (
    FIRST_SCALE,
    RecipeTrainer,
    TrainingData,
    loss_scaler,
)
from finetune_trainer.train.recipe.watch import TrainingWatch
from tests.integration.trainer.recipe import make_work
from tests.integration.trainer.test_distributed import make_rows

SETTINGS: dict[str, Any] = {
    "epochs": 2,
    "learningRate": 1e-3,
    "batchSize": 2,
    "gradientAccumulationSteps": 2,
    "loggingSteps": 1,
    "warmupRatio": 0,
    "lora": {"r": 8, "dropout": 0},
}
STEPS = 10


@dataclass
class Training16:
    trainer: RecipeTrainer
    work: TrainingWork
    notices: list[Notice]

    def run(self) -> None:
        sft.train(self.trainer, self.work, None, None)

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        model = cast("torch.nn.Module", self.trainer.model)
        return [p for p in model.parameters() if p.requires_grad]

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]


def build(
    model: Path,
    workdir: Path,
    dtype: torch.dtype,
    scaler: torch.amp.GradScaler | None = None,
    **changes: Any,
) -> Training16:
    workdir.mkdir(exist_ok=True)
    work = make_work(model, workdir, make_rows(18, 1), **SETTINGS)
    work = work.model_copy(update=changes)
    tokenizer = load_tokenizer(ModelFolder(model))
    examples, _ = sft.read_rows(work, tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    data = TrainingData(examples, None, packed=prepare_packing(loaded))
    trainer = sft.build_trainer(loaded, tokenizer, data, work=work, epochs=2)
    if scaler is not None:
        trainer.accelerator.scaler, trainer.accelerator.native_amp = scaler, True
    notices: list[Notice] = []
    trainer.add_callback(TrainingWatch(notices.append, work.config.training, scaler))
    return Training16(trainer, work, notices)


def test_float16_learns_what_float32_does(tiny_model: Path, tmp_path: Path) -> None:
    exact = build(tiny_model, tmp_path / "float32", torch.float32)
    exact.run()
    scaler = loss_scaler("cpu")
    rough = build(tiny_model, tmp_path / "float16", torch.float16, scaler)
    assert rough.trainer.args.fp16
    assert not rough.trainer.args.bf16
    rough.run()

    assert scaler.get_scale() == FIRST_SCALE, "no update was left out"
    assert rough.losses == pytest.approx(exact.losses, abs=0.02)
    assert exact.losses[-1] < exact.losses[0] - 0.2
    assert all(p.dtype is torch.float32 for p in rough.trained), "updates would be lost in 16 bits"
    assert not rough.notices


def test_a_scale_that_is_too_large_comes_down_and_is_no_divergence(
    tiny_model: Path, tmp_path: Path
) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    training = build(tiny_model, tmp_path / "w", torch.float16, scaler)
    training.run()

    halvings = 20 - torch.tensor(scaler.get_scale()).log2().item()
    assert halvings > 3, "more in a row than would end a training in other types"
    assert halvings < STEPS
    assert not training.notices
    assert training.losses[-1] < training.losses[0]


def test_a_loss_that_is_no_number_at_any_scale_ends_it(tiny_model: Path, tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    training = build(tiny_model, tmp_path / "w", torch.float16, scaler)
    with torch.no_grad():
        training.trained[0].fill_(torch.nan)

    with pytest.raises(StageError) as caught:
        training.run()

    assert caught.value.reason is Reason.TRAINING_DIVERGED
    assert "step 1, 2, 3" in caught.value.message


def test_the_scale_is_part_of_a_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    training = build(tiny_model, tmp_path / "w", torch.float16, scaler)
    training.run()
    save: Any = training.trainer._save_checkpoint
    save(training.trainer.model, trial=None)
    folder = training.work.checkpoints / f"checkpoint-{STEPS}"
    assert (folder / "scaler.pt").exists()

    other = torch.amp.GradScaler("cpu", init_scale=2.0)
    resumed = build(tiny_model, tmp_path / "w", torch.float16, other)
    resumed.trainer._load_scaler(str(folder))
    assert other.state_dict()["scale"] == 512.0
