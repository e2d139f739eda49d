"""The recipe: supervised fine-tuning of a LoRA adapter. Read it from top to bottom.

    rows of {prompt: [user message], completion: [assistant message]}
      -> the tokenizer's chat template -> token ids, labels = the answer and its end of turn only
      -> frozen base model (16 or 32 bit; 4-bit NF4 for qlora) + trainable low-rank matrices
      -> AdamW -> adapter_model.safetensors

Nothing is left to a library's default that decides on the result: every hyperparameter is passed
on by name. Not covered: several GPUs, checkpoints and resuming, evaluation rows, packing.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from peft import LoraConfig, PeftModel
from torch.nn.functional import cross_entropy
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
)
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from finetune_trainer.base_model.loading import (
    compute_dtype,
    device_name,
    load_model,
    training_device,
    use_available_cpus,
)
from finetune_trainer.base_model.tokenizer import IGNORED, end_of_turn_ids, load_tokenizer
from finetune_trainer.config import Lora, Model, Training, TrainingPlan
from finetune_trainer.outcome import Reason, StageError
from finetune_trainer.progress import Reporter
from finetune_trainer.train.callback import ProgressReport
from finetune_trainer.train.channel import Channel
from finetune_trainer.train.work import Trained, Work

log = logging.getLogger(__name__)


def fine_tune(work: Work, reporter: Reporter, _channel: Channel | None = None) -> Trained:
    """Train on the rows of `work.examples`; adapter and tokenizer go to `work.adapter`."""
    config, settings = work.config, work.config.training
    use_available_cpus()
    rows = read_rows(work.examples)
    epochs = resolve_epochs(settings.epochs, len(rows))

    tokenizer = load_tokenizer(work.model, trust_remote_code=config.model.trust_remote_code)
    log.info("Device: %s", device_name())
    log.info("Model: %s (%s)", config.model.source, settings.method)
    reporter.message("Loading the base model")
    model = load_model(
        work.model,
        compute_dtype(),
        training_device(),
        quantize=settings.method == "qlora",
        trust_remote_code=config.model.trust_remote_code,
    )
    parameters = model.num_parameters()
    trainer = build_trainer(
        model,
        tokenizer,
        rows,
        settings=settings,
        plan=work.plan,
        epochs=epochs,
        work=work.room,
        reporter=reporter,
    )
    tuned = cast("torch.nn.Module", trainer.model)
    trainable = trainable_parameters(tuned)
    check_labels(trainer.train_dataset, tokenizer, len(rows))
    share = f"{trainable:,} / {parameters:,} ({trainable / parameters:.4%})"
    log.info("Trainable parameters / base parameters: %s", share)
    log.info("Training examples: %d, epochs: %d", len(rows), epochs)
    reporter.message("Training")
    began = time.monotonic()
    result = trainer.train()
    if not math.isfinite(result.training_loss):
        raise StageError(
            Reason.INVALID_CONFIG,
            f"The loss became {result.training_loss}: lower training.learningRate "
            f"({settings.learning_rate:g}).",
        )
    save_adapter(trainer, tokenizer, work.adapter, config.model)
    metrics = {
        "trainLoss": result.training_loss,
        "finalLoss": _last_loss(trainer, result.training_loss),
        "trainRuntimeSeconds": time.monotonic() - began,
        "trainSteps": float(trainer.state.global_step),
        "trainableParameters": float(trainable),
        "baseParameters": float(parameters),
    }
    effective = {**settings.model_dump(mode="json"), "epochs": epochs}
    return Trained(metrics={k: round(v, 6) for k, v in metrics.items()}, effective=effective)


def read_rows(examples: Path) -> list[dict[str, Any]]:
    """Read what `prepare` wrote: a JSON object with prompt and completion messages a line."""
    with examples.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def resolve_epochs(epochs: int | str, rows: int) -> int:
    """Small data needs more passes: `auto` is 5 under 500 rows, 3 up to 5,000 rows, 2 above."""
    if isinstance(epochs, int):
        return epochs
    if rows < 500:
        return 5
    return 3 if rows <= 5000 else 2


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    *,
    settings: Training,
    plan: TrainingPlan,
    epochs: int,
    work: Path,
    reporter: Reporter,
) -> SFTTrainer:
    """Put model, adapter, data and hyperparameters together."""
    datasets.disable_progress_bars()
    # TRL's own loss is a Triton kernel, which only a GPU runs.
    kind = SFTTrainer if torch.cuda.is_available() else CpuTrainer
    trainer = kind(
        model=model,
        args=arguments(settings, plan, epochs, work),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config(settings.lora),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressReport(reporter))
    return trainer


class CpuTrainer(SFTTrainer):
    """The same loss in plain PyTorch; logits are computed only where a label is."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Sum of the cross entropy over the labels, divided by their number in the whole batch."""
        assert not return_outputs, "asked for by evaluation only"  # noqa: S101
        targets = inputs["labels"][:, 1:]  # [batch, time - 1]: each position predicts the next
        keep = (targets != IGNORED).any(dim=0).nonzero().flatten()
        logits = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            logits_to_keep=keep,
            use_cache=False,
        ).logits  # [batch, kept, vocabulary]
        kept = targets[:, keep]
        total = cross_entropy(
            logits.flatten(0, 1).float(), kept.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        self._total_train_tokens += int(inputs["attention_mask"].sum())
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        labels = (kept != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return total / labels


def lora_config(lora: Lora) -> LoraConfig:
    """The adapter: W x + (alpha / r) B A x in each target module, with B = 0 at the start."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=[module.value for module in lora.target_modules],
        bias="none",
        use_rslora=False,
        use_dora=False,
    )


def arguments(settings: Training, plan: TrainingPlan, epochs: int, work: Path) -> SFTConfig:
    """The hyperparameters, by TRL's names."""
    gpu = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(work / "trainer"),
        num_train_epochs=epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup_ratio,  # below 1 it is the share of all steps
        per_device_train_batch_size=plan.batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        optim="adamw_torch",
        weight_decay=settings.weight_decay,
        max_grad_norm=1.0,
        seed=settings.seed,
        data_seed=settings.seed,
        max_length=settings.max_sequence_length,
        truncation_mode="keep_start",
        completion_only_loss=True,
        packing=False,
        shuffle_dataset=False,  # the sampler shuffles
        # Rows of like length share a batch, so that little of it is padding.
        train_sampling_strategy="group_by_length",
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        bf16=compute_dtype() is torch.bfloat16,
        fp16=False,
        tf32=True if gpu and torch.cuda.get_device_capability() >= (8, 0) else None,
        use_cpu=not gpu,
        gradient_checkpointing=plan.gradient_checkpointing,
        dataloader_num_workers=0,
        dataloader_pin_memory=gpu,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def trainable_parameters(model: torch.nn.Module) -> int:
    """Parameters that the optimizer changes; StageError when there are none."""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if count == 0:
        raise StageError(
            Reason.INVALID_CONFIG,
            "No parameter is trainable: none of training.lora.targetModules is in this model.",
        )
    return count


def check_labels(dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Make sure that every row teaches something and that the end of the turn is learnt."""
    if len(dataset) != rows:
        # `prepare` leaves such rows out, so this is another tokenizer than it saw.
        raise StageError(
            Reason.INTERNAL_ERROR,
            f"{rows - len(dataset)} of {rows} examples have no answer within maxSequenceLength.",
        )
    ends = end_of_turn_ids(tokenizer)
    if not any(ends.intersection(labels) for labels in dataset["labels"]):
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            "No example's labels contain an end-of-turn token, so the tuned model would never "
            "stop: raise training.maxSequenceLength, or correct the model's chat template.",
        )


def save_adapter(
    trainer: SFTTrainer, tokenizer: PreTrainedTokenizerBase, adapter: Path, model: Model
) -> None:
    """Write adapter_config.json, adapter_model.safetensors and the tokenizer's files."""
    tuned = cast("PeftModel", trainer.model)
    # The model as the user named it; PEFT would note the folder that it was fetched to.
    tuned.active_peft_config.base_model_name_or_path = model.source
    tuned.save_pretrained(str(adapter))
    tokenizer.save_pretrained(adapter)
    (adapter / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card
    for file in adapter.iterdir():
        file.chmod(0o644)  # safetensors are saved for their owner only


def _last_loss(trainer: SFTTrainer, otherwise: float) -> float:
    losses: Iterable[float] = (
        e["loss"] for e in reversed(trainer.state.log_history) if "loss" in e
    )
    return float(next(iter(losses), otherwise))
