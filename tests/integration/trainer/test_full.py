"""Full fine-tuning: every weight is trained, and no adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from finetune_trainer.local import merge_adapter, train_adapter
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.tokenizer import load_tokenizer, message_pair
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.train.recipe import sft
from finetune_trainer.train.recipe.data import PaddingCollator
from finetune_trainer.train.recipe.trainer import RecipeTrainer, loss_scaler
from hack.object_store import Credentials
from tests.integration.trainer.architectures import in_dtype
from tests.integration.trainer.conftest import ROWS, write_csv
from tests.integration.trainer.conftest import Trainer as RunTrainer
from tests.integration.trainer.recipe import build, tokenized

EXAMPLES = [message_pair(*row) for row in ROWS]
RATE, STEPS = 1e-3, 4


def trained(trainer: Any) -> dict[str, torch.Tensor]:
    trainer.args.num_train_epochs = STEPS
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def full(
    model: Path, folder: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> RecipeTrainer:
    """The trainer, on hardware that computes in this type."""
    monkeypatch.setattr(sft, "compute_dtype_of", lambda _: dtype)
    return build(
        model,
        folder,
        EXAMPLES,
        method="full",
        lora={},
        learningRate=RATE,
        batchSize=2,
        gradientAccumulationSteps=3,
        scheduler="constant",
        warmupRatio=0,
        loggingSteps=1,
    )


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_it_trains_as_transformers_own_trainer_does(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of all rows, so that their order doesn't matter; packed here, padded there.

    In 16 bits it learns nearly the same, from weights in float32. On a CPU accelerate has no scaler
    for float16, so that PyTorch's own takes its place.
    """
    ours = full(tiny_model, tmp_path, torch.float32, monkeypatch)
    rows = tokenized(tiny_model, tmp_path, EXAMPLES).rows
    base = cast("PreTrainedModel", AutoModelForCausalLM.from_pretrained(tiny_model, dtype="auto"))
    before = {name: p.detach().float().clone() for name, p in base.named_parameters()}
    theirs = Trainer(
        model=in_dtype(base, torch.float32),
        args=TrainingArguments(
            output_dir=str(tmp_path / "theirs"),
            per_device_train_batch_size=len(EXAMPLES),
            learning_rate=RATE,
            lr_scheduler_type="constant",
            num_train_epochs=STEPS,
            optim="adamw_torch",
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,  # the labels are made of one
        ),
        train_dataset=rows,
        data_collator=PaddingCollator(
            cast("int", load_tokenizer(ModelFolder(tiny_model)).pad_token_id)
        ),
    )
    found, expected = trained(ours), trained(theirs)

    assert found.keys() == expected.keys()
    assert all(
        p.requires_grad and p.dtype is torch.float32
        for p in cast("torch.nn.Module", ours.model).parameters()
    )
    moved = STEPS * RATE  # Adam's first steps are as long as the rate
    for name, value in expected.items():
        assert float((value - before[name]).abs().max()) > 0.5 * RATE, name
        assert float((found[name] - value).abs().max()) < 0.02 * moved, name
    assert len(losses(ours)) == STEPS
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4)

    for dtype in (torch.bfloat16, torch.float16):
        rough = full(tiny_model, tmp_path, dtype, monkeypatch)
        assert rough.args.bf16 is (dtype is torch.bfloat16)
        assert rough.args.fp16 is (dtype is torch.float16)
        if rough.args.fp16:
            rough.accelerator.scaler, rough.accelerator.native_amp = loss_scaler("cpu"), True
        found = trained(rough)
        assert losses(rough) == pytest.approx(losses(ours), rel=0.02)
        for name, value in expected.items():
            assert found[name].dtype is torch.float32
            # Adam divides gradients by themselves: one that is rounded to 0 is a step less.
            assert float((found[name] - value).abs().mean()) < 0.5 * RATE, name


def test_a_csv_becomes_a_gguf_without_an_adapter(
    trainer: RunTrainer, run_config: dict[str, Any], moto: Credentials, tiny_model: Path
) -> None:
    run_config["training"] = {
        "method": "full",
        "learningRate": 2e-3,
        "epochs": 15,
        "gradientAccumulationSteps": 1,
    }
    run_config["dataset"]["evalSource"] = "s3://trainer-bucket/data/eval.csv"
    bucket, _, prefix = run_config["output"]["uri"].removeprefix("s3://").partition("/")
    client = moto.client()
    held_out = "instruction,response\nWho made it?,It was made by Odalys.\n"
    client.put_object(Bucket=bucket, Key="data/eval.csv", Body=held_out.encode())

    for stage in ("prepare", "train", "export"):
        run = trainer(stage, run_config)
        assert run.code == 0, run.output
        assert run.result is not None
        if stage == "prepare":
            assert run.result.resolved is not None
            run_config["resolved"] = run.result.resolved.model_dump(mode="json")
        if stage == "train":
            assert run.result.metrics["trainableParameters"] == 3_219_776
    version = run_config["resolved"]["fingerprints"]["export"][:12]
    folder = f"{prefix}/versions/{version}"

    def read(path: str) -> bytes:
        found: bytes = client.get_object(Bucket=bucket, Key=f"{folder}/{path}")["Body"].read()
        return found

    manifest = json.loads(read("manifest.json"))
    paths = {item["path"] for item in manifest["files"]}
    assert {"gguf/tiny-F16.gguf", "gguf/tiny-Q8_0.gguf", "merged/model.safetensors"} <= paths
    assert not [path for path in paths if "adapter" in path or "LoRA" in path]
    gate = manifest["gate"]
    assert [check["file"] for check in gate["files"]] == ["tiny-F16.gguf", "tiny-Q8_0.gguf"]
    assert all(check["quality"]["passed"] for check in gate["files"])
    assert gate["basePerplexity"] > 2 * gate["tunedPerplexity"], "the base model is measured too"
    assert "lora" not in manifest["lineage"]["hyperparameters"]
    assert manifest["lineage"]["hyperparameters"]["learningRate"] == 2e-3
    card = read("README.md").decode()
    assert "fine-tuned in full, all of its weights, on 6 examples" in card
    assert "PeftModel" not in card
    assert "\n- lora\n" not in card
    # The merge is a copy, in the base model's type.
    train = f"{prefix}/stages/train/{run_config['resolved']['fingerprints']['train']}"
    whole = client.get_object(Bucket=bucket, Key=f"{train}/tuned/model.safetensors")["Body"].read()
    trained, merged = load(whole), load(read("merged/model.safetensors"))
    assert trained.keys() == merged.keys() == load_file(tiny_model / "model.safetensors").keys()
    for name, value in trained.items():
        assert value.dtype is torch.float32
        assert torch.equal(merged[name], value.half()), name


def test_on_one_machine_the_whole_model_lies_where_the_adapter_would(
    tiny_model: Path, tmp_path: Path
) -> None:
    models, data = tmp_path / "models", tmp_path / "my.csv"
    write_csv(data)
    settings = [
        f"dataset.source={data}",
        f"model.source={tiny_model}",
        "training.method=full",
        "training.epochs=4",
        "training.learningRate=1e-3",
    ]
    with Reporter() as reporter:
        said = train_adapter(settings, models, reporter)
        assert said.message.startswith(f"the tuned model is in {models / 'tuned'}. Next: `")
        assert not (models / "lora_adapter").exists()
        merge_adapter(models, reporter)
    trained = load_file(models / "tuned" / "model.safetensors")
    merged = load_file(models / "merged" / "model.safetensors")
    assert merged.keys() == trained.keys()
    assert all(torch.equal(merged[name], value.half()) for name, value in trained.items())
