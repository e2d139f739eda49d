"""The recipe on a tiny model: what it learns from, how it adds up, and in 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import datasets
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.export.merge.model_folder import write_model
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.adapter import OutlineRequest, outline_here
from finetune_trainer.model.loading import load_model
from finetune_trainer.model.shape import Shape
from finetune_trainer.model.tokenizer import load_tokenizer, message_pair
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.train.recipe import sft
from finetune_trainer.train.recipe.data import check_rows
from finetune_trainer.train.recipe.trainer import RecipeTrainer
from tests.integration.trainer.adapters import merge_in_memory
from tests.integration.trainer.conftest import ROWS
from tests.integration.trainer.recipe import build, make_work, tokenized

EXAMPLES = [message_pair(*row) for row in ROWS]


def test_our_labels_are_trls_own(tiny_model: Path, tmp_path: Path) -> None:
    """TRL's preparation of the same rows, which it does unless it is told to skip it."""
    tokenizer = load_tokenizer(ModelFolder(tiny_model))
    ours = cast("datasets.Dataset", build(tiny_model, tmp_path, EXAMPLES).train_dataset)
    trls = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(tmp_path), completion_only_loss=True, use_cpu=True, bf16=False
        ),
        train_dataset=datasets.Dataset.from_list(EXAMPLES),
        processing_class=tokenizer,
    )
    theirs = cast("datasets.Dataset", trls.train_dataset)
    for row, reference in zip(ours, theirs, strict=True):
        assert row["input_ids"] == reference["input_ids"]
        assert row["labels"] == reference["labels"]


def test_rows_are_cut_at_the_longest_sequence(tiny_model: Path, tmp_path: Path) -> None:
    long = message_pair("Say a lot.", "word " * 100)
    examples = tokenized(tiny_model, tmp_path, [*EXAMPLES, long], length=64)
    assert examples.lengths.max() == 64
    assert examples.lengths.tolist() == [len(row["input_ids"]) for row in examples.rows]


def test_the_loss_is_the_models_own(tiny_model: Path, tmp_path: Path) -> None:
    trainer = build(tiny_model, tmp_path, EXAMPLES, packing=False)
    model = cast("PeftModel", trainer.model)
    rows = cast("datasets.Dataset", trainer.train_dataset)
    batch = trainer.data_collator([rows[i] for i in range(4)])
    with torch.no_grad():
        ours = trainer.compute_loss(model, dict(batch))
        theirs = model(**batch).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def gradients(trainer: Any) -> dict[str, torch.Tensor]:
    """What the first optimizer step gets to see, before it is clipped."""
    found: dict[str, torch.Tensor] = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            for name, parameter in trainer.model.named_parameters():
                if parameter.requires_grad:
                    found[name] = parameter.grad.clone()

    trainer.args.max_grad_norm = 0.0
    trainer.args.max_steps = 1
    trainer.add_callback(Look())
    trainer.train()
    return found


@pytest.mark.parametrize(
    ("packing", "takes_count"),
    [
        pytest.param(True, True, id="packed"),
        pytest.param(False, True, id="padded"),
        pytest.param(True, False, id="a model that says it takes no count of labels"),
    ],
)
def test_accumulated_batches_are_one_large_batch(
    tiny_model: Path,
    tmp_path: Path,
    packing: bool,
    takes_count: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of different length, which a mean of means would weigh wrongly."""
    # As Gemma 3n's and Gemma 4's classes say.
    monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", takes_count, raising=False)

    def accumulated(batch: int, steps: int) -> dict[str, torch.Tensor]:
        return gradients(
            build(
                tiny_model,
                tmp_path,
                EXAMPLES,
                batchSize=batch,
                gradientAccumulationSteps=steps,
                packing=packing,
            )
        )

    large = accumulated(6, 1)
    assert sum(float(value.abs().sum()) for value in large.values()) > 0
    for steps in (2, 6):
        small = accumulated(6 // steps, steps)
        for name, value in large.items():
            scale = float(value.abs().max())
            torch.testing.assert_close(small[name], value, rtol=1e-4, atol=1e-5 * scale)


def test_short_rows_share_a_pass_and_the_adapter_stays_the_same(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One long row a step: planned by it, each pass has a row; by tokens, fewer passes do."""
    rows = [
        message_pair(f"Say {number}.", "word " * (200 if number % 8 == 3 else 1 + number % 3))
        for number in range(16)
    ]

    def trained(
        tokens: int | None, **options: Any
    ) -> tuple[dict[str, torch.Tensor], list[float], list[int]]:
        trainer = build(
            tiny_model,
            tmp_path,
            rows,
            batchSize=1,
            gradientAccumulationSteps=8,
            loggingSteps=1,
            pass_tokens=tokens,
        )
        vars(trainer.args).update(options)
        passes: list[int] = []
        forward = trainer.compute_loss

        def look(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
            passes.append(inputs["input_ids"].numel())
            return forward(model, inputs, **options)

        monkeypatch.setattr(trainer, "compute_loss", look)
        trainer.train()
        model = cast("PeftModel", trainer.model)
        state = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        return state, losses, passes

    longest = int(tokenized(tiny_model, tmp_path, rows).lengths.max())
    alone, alone_losses, alone_passes = trained(None)
    # AdamW and the loader as on a GPU.
    fused = {"optim": "adamw_torch_fused", "dataloader_num_workers": 1}
    shared, shared_losses, shared_passes = trained(longest, dataloader_prefetch_factor=2, **fused)
    assert len(alone_passes) == 16
    assert len(shared_passes) <= 6
    assert max(shared_passes) <= longest
    assert sum(shared_passes) == sum(alone_passes)
    assert shared_losses == pytest.approx(alone_losses, rel=1e-5)
    for name, weights in alone.items():
        assert torch.allclose(shared[name], weights, atol=1e-5), name


def test_a_wrong_weight_of_the_passes_would_be_seen(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of the passes' means, the classical mistake, differs by far more than rounding."""
    large = gradients(build(tiny_model, tmp_path, EXAMPLES, batchSize=6))
    honest = RecipeTrainer.compute_loss

    def mean_of_means(self: Any, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        return honest(self, model, inputs) / 6

    monkeypatch.setattr(RecipeTrainer, "compute_loss", mean_of_means)
    small = gradients(
        build(tiny_model, tmp_path, EXAMPLES, batchSize=1, gradientAccumulationSteps=6)
    )
    worst = max(
        float((small[name] - value).abs().max() / value.abs().max())
        for name, value in large.items()
        if value.abs().max() > 0
    )
    assert worst > 0.01


def test_rows_without_an_answer_are_not_dropped_silently(tiny_model: Path, tmp_path: Path) -> None:
    rows = [*EXAMPLES, message_pair("why " * 100, "Because.")]
    examples = tokenized(tiny_model, tmp_path, rows, length=64)
    with pytest.raises(StageError, match="1 of 7 examples have no answer"):
        check_rows(examples, shortened=False)
    check_rows(examples, shortened=True)  # memory ran out: they stay, and teach nothing


def test_a_row_cut_before_its_end_does_not_count_as_an_end(
    tiny_model: Path, tmp_path: Path
) -> None:
    rows = [message_pair("Say a lot.", "word " * 100)]
    with pytest.raises(StageError) as caught:
        check_rows(tokenized(tiny_model, tmp_path, rows, length=64), shortened=False)
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED


@pytest.mark.parametrize(("rows", "epochs"), [(1, 5), (499, 5), (500, 3), (5000, 3), (5001, 2)])
def test_auto_epochs(rows: int, epochs: int) -> None:
    assert sft.resolve_epochs("auto", rows) == epochs
    assert sft.resolve_epochs(7, rows) == 7


def test_qlora_trains_and_merges_into_a_16_bit_model(tiny_model: Path, tmp_path: Path) -> None:
    work = make_work(
        tiny_model,
        tmp_path,
        EXAMPLES,
        method="qlora",
        epochs=10,
        learningRate=0.005,
        gradientAccumulationSteps=1,
    )
    adapter = work.adapter
    trained = sft.fine_tune(work, Reporter())
    assert trained.metrics.base_parameters == 3_219_776
    saved = load_file(adapter / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    # In bfloat16 the low half of each number would be zeros.
    assert all((value.view(torch.int32) & 0xFFFF).any() for value in saved.values())
    assert (trained.metrics.final_loss or 0) < (trained.metrics.train_loss or 0)
    write_model(ModelFolder(tiny_model), adapter, tmp_path / "merged")
    before = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {value.dtype for value in after.values()} == {torch.float16}


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        pytest.param({"targetModules": ["all-linear"]}, 28, id="all linear layers"),
        pytest.param({"targetModules": ["layers.1.mlp.down_proj", "k_proj"]}, 6, id="some layers"),
        # The tiny model has one for both, saved under both names.
        pytest.param({"modulesToSave": ["embed_tokens"]}, 18, id="embeddings"),
    ],
)
def test_what_is_named_is_trained_and_merged_as_peft_merges_it(
    tiny_model: Path, tmp_path: Path, lora: dict[str, Any], expected: int
) -> None:
    lora = {"r": 4, **lora}
    work = make_work(tiny_model, tmp_path, EXAMPLES, epochs=3, learningRate=0.01, lora=lora)
    trained = sft.fine_tune(work, Reporter())
    saved = load_file(work.adapter / "adapter_model.safetensors")
    assert len(saved) == expected
    shape = Shape.of_model(tiny_model)
    if len(lora.get("targetModules", ())) < 2:  # the shape has no names of single layers
        assert shape
        assert shape.adapter(work.config.training.lora) == trained.metrics.trainable_parameters
    assert all(each.any() for each in saved.values()), "B is trained"
    outline = outline_here(
        OutlineRequest(model=ModelFolder(tiny_model), lora=work.config.training.lora)
    )
    assert outline.tensors == {name: tuple(each.shape) for name, each in saved.items()}
    write_model(ModelFolder(tiny_model), work.adapter, tmp_path / "ours")
    merge_in_memory(tiny_model, work.adapter, tmp_path / "theirs")
    assert_merged_as_peft_does(tmp_path / "ours", tmp_path / "theirs")


def assert_merged_as_peft_does(ours: Path, theirs: Path) -> None:
    merged, expected = (load_file(each / "model.safetensors") for each in (ours, theirs))
    assert merged.keys() == expected.keys()
    for name, value in merged.items():
        assert torch.equal(value, expected[name].to(value.dtype)), name


def test_4_bit_weights_are_not_repacked_by_an_evaluation(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As bitsandbytes does on CPUs with AVX512-BF16; a backward pass would then misread them."""
    from bitsandbytes.nn import modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    model = load_model(ModelFolder(tiny_model), torch.bfloat16, "cpu", quantize=True)
    layers = [each for each in model.modules() if isinstance(each, modules.Linear4bit)]
    assert len(layers) == 2 * 7
    before = [layer.weight.clone() for layer in layers]
    model.eval()  # type: ignore[no-untyped-call] # transformers
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    assert all(torch.equal(layer.weight, old) for layer, old in zip(layers, before, strict=True))
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


GUIDE = {
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3,
    "warmup_steps": 0.03,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.0,
    "logging_steps": 10,
    "seed": 42,
    "data_seed": 42,
}
OTHERS: dict[str, Any] = {
    "learning_rate": 3e-5,
    "per_device_train_batch_size": 6,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 7,
    "warmup_steps": 0.2,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.01,
    "logging_steps": 4,
    "seed": 5,
    "data_seed": 5,
}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, GUIDE),
        (
            {
                "learningRate": 3e-5,
                "batchSize": 3,
                "gradientAccumulationSteps": 2,
                "warmupRatio": 0.2,
                "scheduler": "cosine",
                "weightDecay": 0.01,
                "loggingSteps": 4,
                "seed": 5,
            },
            OTHERS,
        ),
    ],
    ids=["the guide's defaults", "others"],
)
def test_every_hyperparameter_reaches_the_trainer_and_no_default_of_a_library_does(
    tiny_model: Path, tmp_path: Path, settings: dict[str, Any], expected: dict[str, Any]
) -> None:
    """TRL's own would be, for one, a learning rate of 2e-5."""
    work = make_work(tiny_model, tmp_path, EXAMPLES, **settings)
    made = sft.arguments(work, expected["num_train_epochs"], evaluate=False, dtype=torch.float32)
    assert {name: getattr(made, name) for name in expected} == expected
    assert (made.fp16, made.optim, made.max_grad_norm) == (False, "adamw_torch", 1.0)


def test_a_merge_that_changes_nothing_fails(tiny_model: Path, tmp_path: Path) -> None:
    trainer = build(tiny_model, tmp_path, EXAMPLES)  # untrained: B is zero
    cast("PeftModel", trainer.model).save_pretrained(str(tmp_path / "adapter"))
    load_tokenizer(ModelFolder(tiny_model)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(StageError) as caught:
        write_model(ModelFolder(tiny_model), tmp_path / "adapter", tmp_path / "merged")
    assert caught.value.reason is Reason.QUALITY_GATE_FAILED
