"""DoRA, which learns a magnitude for each output beside LoRA's two matrices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from finetune_trainer.contract import Lora
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.loading import load_model
from finetune_trainer.model.shape import Shape
from finetune_trainer.model.tokenizer import load_tokenizer, message_pair
from finetune_trainer.train.link import TrainingWork
from finetune_trainer.train.recipe import saving, sft
from finetune_trainer.train.recipe.lora import count_trainable_parameters
from finetune_trainer.train.recipe.trainer import RecipeTrainer, TrainingData
from tests.integration.trainer.conftest import ROWS
from tests.integration.trainer.families import FAMILIES, write_family
from tests.integration.trainer.recipe import base_of, make_work

EXAMPLES = [message_pair(*row) for row in ROWS]
SETTINGS: dict[str, Any] = {
    "batchSize": 1,
    "gradientAccumulationSteps": 1,
    "learningRate": 0.01,
    "checkpointSteps": 2,
    "lora": {"r": 4, "dropout": 0.1, "useDora": True},
}
Make = Callable[..., tuple[RecipeTrainer, TrainingWork]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(FAMILIES["phi-3"], tmp_path_factory.mktemp("models") / "phi-3")


@pytest.fixture
def make(model: Path, tmp_path: Path) -> Make:
    """Trainers of one epoch of six steps."""
    count = iter(range(10))

    def build(
        resume_from: Path | None = None, dtype: torch.dtype = torch.float32, **settings: Any
    ) -> tuple[RecipeTrainer, TrainingWork]:
        workdir = tmp_path / f"workdir-{next(count)}"
        workdir.mkdir()
        work = make_work(model, workdir, EXAMPLES, EXAMPLES[:2], **{**SETTINGS, **settings})
        work = work.model_copy(update={"resume_from": resume_from})
        tokenizer = load_tokenizer(ModelFolder(model))
        examples, held_out = sft.read_rows(work, tokenizer)
        quantize = work.config.training.method == "qlora"
        loaded = load_model(ModelFolder(model), dtype, "cpu", quantize=quantize)
        data = TrainingData(examples, held_out, packed=False)
        return sft.build_trainer(loaded, tokenizer, data, work=work, epochs=1), work

    return build


def trained(trainer: RecipeTrainer, work: TrainingWork) -> dict[str, torch.Tensor]:
    saving.train_with_checkpoints(trainer, work, None)
    sft.save_result(trainer, load_tokenizer(work.model), work)
    return load_file(work.adapter / "adapter_model.safetensors")


def test_a_resumed_training_ends_with_the_same_adapter(make: Make) -> None:
    trainer, work = make()
    expected = trained(trainer, work)
    found = trained(*make(work.checkpoints / "checkpoint-2"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    magnitudes = [name for name in found if "magnitude" in name]
    assert len(magnitudes) == 2 * 2, "of qkv_proj and o_proj in both layers"


def test_the_predicted_parameters_are_those_that_are_trained(make: Make) -> None:
    trainer, work = make()
    assert trainer.model is not None
    config = base_of(trainer).config.to_dict()
    shape = Shape.from_config(config)
    assert shape is not None
    lora = work.config.training.lora
    assert shape.adapter(lora) == count_trainable_parameters(trainer.model)
    plain = Lora(r=lora.r, target_modules=lora.target_modules)
    outputs = (shape.query + 2 * shape.key_value) + shape.hidden
    assert shape.adapter(lora) - shape.adapter(plain) == shape.layers * outputs


def test_the_untrained_adapter_changes_nothing(make: Make) -> None:
    """The evaluation before the training is that of the base model."""
    trainer, _ = make()
    assert isinstance(trainer.model, PeftModel)
    before = trainer.evaluate()["eval_loss"]
    with trainer.model.disable_adapter():
        assert trainer.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitudes_are_trained(make: Make, method: str, dtype: torch.dtype) -> None:
    trainer, work = make(dtype=dtype, method=method)
    assert trainer.model is not None
    before = {
        name: parameter.detach().clone()
        for name, parameter in trainer.model.named_parameters()
        if "magnitude" in name
    }
    assert len(before) == 4
    trained(trainer, work)
    after = dict(trainer.model.named_parameters())
    assert all(not torch.equal(after[name], value) for name, value in before.items())
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] < losses[0]
