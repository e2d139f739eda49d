"""Preferences on a tiny model: TRL's losses, however a step is split; and they are learnt."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from finetune_trainer.contract import Example, Lora, Preference
from finetune_trainer.export.merge.model_folder import write_model
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.adapter import lora_config
from finetune_trainer.model.tokenizer import IGNORED, load_tokenizer
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.train.link import InterruptedTrainingError, TrainingWork
from finetune_trainer.train.recipe import sft
from finetune_trainer.train.recipe.preference import (
    AnswerScores,
    PassesWithOthers,
    orpo_losses,
)
from finetune_trainer.train.recipe.saving import train_with_checkpoints
from finetune_trainer.train.recipe.training_log import evaluations_of
from tests.integration.trainer.preferences import assistant, make_labelled, make_pairs, user
from tests.integration.trainer.recipe import build, build_from, make_work, tokenized

PAIRS = make_pairs(5)


class PlainHead:
    """TRL's head, which needs a GPU's kernels, in plain PyTorch."""

    @staticmethod
    def apply(
        hidden: torch.Tensor, weight: torch.Tensor, _: Any, labels: torch.Tensor, *__: Any
    ) -> tuple[torch.Tensor | None, ...]:
        logits = hidden @ weight.T
        logps = logits.log_softmax(-1)
        chosen = logps.gather(1, labels[:, None])[:, 0]
        entropy = -(logps.exp() * logps).sum(-1)
        return chosen, entropy, None, logits.mean(-1), logits.argmax(-1) == labels


@pytest.fixture(autouse=True)
def _plain_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", PlainHead)


def move_adapter(trainer: Any) -> None:
    """Away from zero, in the same way for every trainer: an adapter begins as none."""
    torch.manual_seed(1)
    for name, parameter in sorted(trainer.model.named_parameters()):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.05


def gradients_of(trainer: Any) -> dict[str, torch.Tensor]:
    found = {
        name: parameter.grad.clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is not None
    }
    trainer.model.zero_grad()
    return found


def one_pass(trainer: Any, *, kl: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of all rows in one pass, in the order of the dataset."""
    rows, count = trainer.train_dataset, len(trainer.train_dataset)
    if kl:
        pairs = [(number, (number - 1) % count) for number in range(count)]
        batch = trainer.data_collator(PassesWithOthers(rows)[pairs])
        trainer._kl = trainer._mean_kl([batch])
    else:
        batch = trainer.data_collator([rows[number] for number in range(count)])
    items = torch.tensor(batch["rows"]) if "rows" in batch else None
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
    loss.backward()
    return float(loss.detach()), gradients_of(trainer)


def trls_own(kind: Any, config: Any, model: Path, rows: list[Example]) -> Any:
    """TRL's trainer on the same rows, with its own preparation of them."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    table: dict[str, list[Any]] = {"prompt": [row["prompt"] for row in rows]}
    if kind is KTOTrainer:
        table["completion"] = [row["completion"] for row in rows]
        table["label"] = [row["label"] for row in rows]
    else:
        table["chosen"] = [row["completion"] for row in rows]
        table["rejected"] = [row["rejected"] for row in rows]
    trainer = kind(
        model=loaded,
        args=config,
        train_dataset=datasets.Dataset.from_dict(table),
        processing_class=load_tokenizer(ModelFolder(model)),
        peft_config=lora_config(Lora(dropout=0), loaded),
    )
    move_adapter(trainer)
    trainer.model.train()
    return trainer


def options(folder: Path, rows: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": rows,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "beta": 0.3,
    }


def check_same(
    ours: tuple[float, dict[str, torch.Tensor]], theirs: tuple[float, dict[str, torch.Tensor]]
) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
    assert ours[1].keys() == theirs[1].keys()
    assert sum(float(each.abs().sum()) for each in theirs[1].values()) > 0
    for name, value in theirs[1].items():
        scale = float(value.abs().max())
        torch.testing.assert_close(ours[1][name], value, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_dpo_is_trls(tiny_model: Path, tmp_path: Path, loss: str) -> None:
    """Its tokens, masks, loss and gradients, packed and padded."""
    theirs = one_pass(
        trls_own(DPOTrainer, DPOConfig(**options(tmp_path, 5), loss_type=[loss]), tiny_model, PAIRS)
    )
    for packing in (True, False) if loss == "sigmoid" else (True,):
        preference = {"beta": 0.3, "lossType": loss}
        ours = build(
            tiny_model, tmp_path, PAIRS, objective="dpo", preference=preference, packing=packing
        )
        move_adapter(ours)
        check_same(one_pass(ours), theirs)


def test_kto_is_trls(tiny_model: Path, tmp_path: Path) -> None:
    """With the KL of other rows' answers, where TRL takes those of one pass."""
    rows = make_labelled(6)
    config = KTOConfig(**options(tmp_path, 6), undesirable_weight=0.7)
    theirs = one_pass(trls_own(KTOTrainer, config, tiny_model, rows))
    preference = {"beta": 0.3, "undesirableWeight": 0.7}
    ours = build(tiny_model, tmp_path, rows, objective="kto", preference=preference)
    move_adapter(ours)
    check_same(one_pass(ours, kl=True), theirs)


def test_the_odds_ratio_is_trls() -> None:
    """Its ORPOTrainer is experimental, and takes the loss over the prompt as well."""
    with warnings.catch_warnings(action="ignore"):  # that it is experimental
        from trl.experimental.orpo import ORPOTrainer

    torch.manual_seed(0)
    logps, tokens = -10 * torch.rand(8), torch.randint(1, 9, (8,)).float()
    scores = AnswerScores(logps, tokens, torch.zeros(()))
    chosen, rejected = (logps / tokens).chunk(2)
    theirs = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    losses, better, worse, *_ = ORPOTrainer.odds_ratio_loss(theirs, chosen, rejected)  # type: ignore[arg-type]
    ours = orpo_losses(scores, Preference(beta=0.3))
    torch.testing.assert_close(ours.losses, -chosen - losses)
    torch.testing.assert_close(ours.rewards, torch.cat([better, worse]))


def test_an_answer_that_is_certain_has_finite_odds() -> None:
    logps = torch.zeros(2, requires_grad=True)
    scores = AnswerScores(logps, torch.ones(2), torch.zeros(()))
    orpo_losses(scores, Preference()).losses.sum().backward()  # type: ignore[no-untyped-call]
    assert logps.grad is not None
    assert torch.isfinite(logps.grad).all()


def first_step(trainer: Any) -> dict[str, torch.Tensor]:
    """What the first optimizer step gets to see, before it is clipped."""
    found: dict[str, torch.Tensor] = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            for name, parameter in trainer.model.named_parameters():
                if parameter.requires_grad:
                    found[name] = parameter.grad.clone()

    move_adapter(trainer)
    trainer.args.max_grad_norm = 0.0
    trainer.args.max_steps = 1
    trainer.add_callback(Look())
    trainer.train()
    return found


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_a_step_is_the_same_however_it_is_split(
    tiny_model: Path, tmp_path: Path, objective: str
) -> None:
    """TRL's mean of means, and KTO's KL of each pass, would differ."""

    def gradients(batch: int, passes: int) -> dict[str, torch.Tensor]:
        fields: dict[str, Any] = {"batchSize": batch, "gradientAccumulationSteps": passes}
        rows = make_labelled(6) if objective == "kto" else PAIRS
        return first_step(build(tiny_model, tmp_path, rows, objective=objective, **fields))

    large, small = gradients(4, 1), gradients(1, 4)
    assert sum(float(value.abs().sum()) for value in large.values()) > 0
    for name, value in large.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(small[name], value, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_what_is_preferred_is_learnt(tiny_model: Path, tmp_path: Path, objective: str) -> None:
    """On rows that were never trained on."""
    pairs = make_pairs(24)
    if objective == "orpo":  # which has no reference: the base prefers the others
        pairs = [swapped(pair) for pair in pairs]
    trainer = build(
        tiny_model,
        tmp_path,
        pairs[:16],
        pairs[16:],  # kto makes two rows of each
        objective=objective,
        learningRate=0.01,
        batchSize=4,
        gradientAccumulationSteps=1,
        scheduler="constant",
    )
    trainer.train()
    found = evaluations_of(trainer)
    base, tuned = found[0], found[max(found)]
    assert tuned["eval_loss"] < base["eval_loss"]
    assert tuned["eval_rewards/margins"] > base["eval_rewards/margins"]
    assert tuned["eval_rewards/accuracies"] > base["eval_rewards/accuracies"]
    if objective != "orpo":  # the reference is the base model
        assert base["eval_rewards/margins"] == 0
        assert tuned["eval_rewards/accuracies"] > 0.8


def test_preferences_are_learnt_against_a_base_in_4_bits(tiny_model: Path, tmp_path: Path) -> None:
    """The reference is what qlora trains on, so that rewards begin at zero."""
    work = make_work(
        tiny_model,
        tmp_path,
        make_pairs(16),
        make_pairs(24)[16:],
        objective="dpo",
        method="qlora",
        epochs=1,
        learningRate=0.01,
        batchSize=4,
        gradientAccumulationSteps=1,
        scheduler="constant",
    )
    metrics = sft.fine_tune(work, Reporter()).metrics
    assert metrics.base_reward_margin == 0
    assert (metrics.reward_margin or 0) > 0
    assert (metrics.reward_accuracy or 0) > 0.8
    assert (metrics.eval_loss or 0) < (metrics.base_eval_loss or 0)
    saved = load_file(work.adapter / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    write_model(ModelFolder(tiny_model), work.adapter, tmp_path / "merged")


def swapped(pair: Example) -> Example:
    return {**pair, "completion": pair["rejected"], "rejected": pair["completion"]}


def test_the_evaluation_is_exact_and_takes_no_part_in_the_training(
    tiny_model: Path, tmp_path: Path
) -> None:
    """The same figures whatever the passes; with kto the step's KL stays what it was."""
    rows = make_labelled(6)
    trainer: Any = build(tiny_model, tmp_path, rows, rows, objective="kto")
    move_adapter(trainer)
    trainer._kl = torch.tensor(3.0)
    found = []
    for batch in (1, 5):
        trainer.limits = replace(trainer.limits, rows=batch, tokens=0)
        found.append(trainer.evaluate())
        assert trainer._kl == 3.0
    for name in ("loss", "rewards/accuracies", "rewards/margins"):
        assert found[0][f"eval_{name}"] == pytest.approx(found[1][f"eval_{name}"], rel=1e-4)


def test_only_the_judged_answer_is_learnt(tiny_model: Path, tmp_path: Path) -> None:
    """Earlier answers of a conversation are read, as TRL has it."""
    earlier = [user("Hello."), assistant("Good day."), *PAIRS[0]["prompt"]]
    row: Example = {**PAIRS[0], "prompt": earlier}
    rows = tokenized(tiny_model, tmp_path, [row], objective="dpo").rows
    tokenizer = load_tokenizer(ModelFolder(tiny_model))
    for ids, labels, said in (
        ("input_ids", "labels", "completion"),
        ("rejected_ids", "rejected_labels", "rejected"),
    ):
        learnt = [label for label in rows[0][labels] if label != IGNORED]
        assert rows[0][ids][-len(learnt) :] == learnt
        text = tokenizer.decode(learnt)
        assert str(text).startswith(row[said][0]["content"])  # type: ignore[literal-required]
        assert "Good day" not in text


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_a_training_that_is_broken_off_ends_with_the_same_adapter(
    tiny_model: Path, tmp_path: Path, objective: str
) -> None:
    """Bit for bit: from the last complete step, though a pass of the next one failed."""

    def make(resume_from: Path | None = None) -> tuple[Any, TrainingWork]:
        rows = make_labelled(4) if objective == "kto" else PAIRS
        work = make_work(
            tiny_model,
            tmp_path,
            rows,
            epochs=1,
            objective=objective,
            batchSize=1,
            gradientAccumulationSteps=2,
        )
        work = work.model_copy(update={"resume_from": resume_from})
        return build_from(work), work

    def finish(trainer: Any, work: TrainingWork) -> dict[str, torch.Tensor]:
        train_with_checkpoints(trainer, work, None)
        return {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}

    whole = finish(*make())
    broken, work = make()
    compute, passes = broken.compute_loss, iter(range(4))

    def fail(*args: Any, **options: Any) -> Any:
        if next(passes) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return compute(*args, **options)

    broken.compute_loss = fail
    with pytest.raises(InterruptedTrainingError) as caught:
        train_with_checkpoints(broken, work, None)
    assert caught.value.step == 1
    resumed = finish(*make(caught.value.checkpoint))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
