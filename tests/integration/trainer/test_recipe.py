"""The recipe on a tiny model: what it learns from, how it adds up, and in 4 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune_trainer.base_model.tokenizer import encode, load_tokenizer, message_pair
from finetune_trainer.config import RunConfig, Training, TrainingPlan
from finetune_trainer.export.merge import merge
from finetune_trainer.outcome import Reason, StageError
from finetune_trainer.progress import Reporter
from finetune_trainer.train import sft
from finetune_trainer.train.work import Work, default_plan
from tests.integration.trainer.conftest import ROWS

EXAMPLES = [message_pair(*row) for row in ROWS]
Losses = list[float]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def build(tiny_model: Path, work: Path, rows: list[Any] | None = None, **settings: Any) -> Any:
    training = Training.model_validate({"epochs": 1, "lora": {"dropout": 0}, **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return sft.build_trainer(
        model,
        load_tokenizer(tiny_model),
        rows or EXAMPLES,
        settings=training,
        plan=TrainingPlan(
            batch_size=training.batch_size,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            gradient_checkpointing=False,
        ),
        epochs=1,
        work=work,
        reporter=Reporter(),
    )


def test_trl_trains_on_the_tokens_that_prepare_counted(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    dataset = build(tiny_model, tmp_path).train_dataset
    for row, example in zip(dataset, EXAMPLES, strict=True):
        assert (row["input_ids"], row["labels"]) == encode(tokenizer, example)


def test_the_loss_is_the_models_own(tiny_model: Path, tmp_path: Path) -> None:
    trainer = build(tiny_model, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        ours = trainer.compute_loss(trainer.model, dict(batch))
        theirs = trainer.model(**batch).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_accumulated_batches_are_one_large_batch(tiny_model: Path, tmp_path: Path) -> None:
    """Rows of different length, which a mean of means would weigh wrongly."""

    def trained(batch: int, steps: int) -> dict[str, torch.Tensor]:
        trainer = build(
            tiny_model,
            tmp_path,
            batchSize=batch,
            gradientAccumulationSteps=steps,
            learningRate=0.01,
            scheduler="constant",
            warmupRatio=0,
        )
        trainer.train()
        return {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}

    large, small = trained(6, 1), trained(1, 6)
    assert any(value.abs().max() > 1e-3 for name, value in large.items() if "lora_B" in name)
    for name, value in large.items():
        torch.testing.assert_close(value, small[name], rtol=1e-3, atol=1e-4)


def test_rows_without_an_answer_are_not_dropped_silently(tiny_model: Path, tmp_path: Path) -> None:
    rows = [*EXAMPLES, message_pair("why " * 100, "Because.")]
    trainer = build(tiny_model, tmp_path, rows, maxSequenceLength=64)
    with pytest.raises(StageError, match="1 of 7 examples have no answer"):
        sft.check_labels(trainer.train_dataset, load_tokenizer(tiny_model), len(rows))


def test_a_row_cut_before_its_end_does_not_count_as_an_end(
    tiny_model: Path, tmp_path: Path
) -> None:
    rows = [message_pair("Say a lot.", "word " * 100)]
    trainer = build(tiny_model, tmp_path, rows, maxSequenceLength=64)
    with pytest.raises(StageError) as caught:
        sft.check_labels(trainer.train_dataset, load_tokenizer(tiny_model), 1)
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED


@pytest.mark.parametrize(("rows", "epochs"), [(1, 5), (499, 5), (500, 3), (5000, 3), (5001, 2)])
def test_auto_epochs(rows: int, epochs: int) -> None:
    assert sft.resolve_epochs("auto", rows) == epochs
    assert sft.resolve_epochs(7, rows) == 7


def test_qlora_trains_and_merges_into_a_16_bit_model(tiny_model: Path, tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {
            "model": {"source": str(tiny_model)},
            "dataset": {"source": "/data/train.csv"},
            "output": {"uri": str(tmp_path)},
            "training": {
                "method": "qlora",
                "epochs": 10,
                "learningRate": 0.005,
                "gradientAccumulationSteps": 1,
            },
        }
    )
    examples = tmp_path / "examples.jsonl"
    examples.write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    work = Work(
        config=config,
        plan=default_plan(config),
        max_sequence_length=64,
        engine="transformers",
        examples=examples,
        held_out=None,
        model=tiny_model,
        room=tmp_path,
    )
    adapter = work.adapter
    trained = sft.fine_tune(work, Reporter())
    assert trained.metrics["baseParameters"] == 3_219_776
    assert trained.metrics["finalLoss"] < trained.metrics["trainLoss"]
    merge(tiny_model, adapter, tmp_path / "merged")
    before = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {value.dtype for value in after.values()} == {torch.float16}


def test_a_merge_that_changes_nothing_fails(tiny_model: Path, tmp_path: Path) -> None:
    trainer = build(tiny_model, tmp_path)  # untrained: B is zero
    trainer.model.save_pretrained(str(tmp_path / "adapter"))
    load_tokenizer(tiny_model).save_pretrained(tmp_path / "adapter")
    with pytest.raises(StageError) as caught:
        merge(tiny_model, tmp_path / "adapter", tmp_path / "merged")
    assert caught.value.reason is Reason.QUALITY_GATE_FAILED
