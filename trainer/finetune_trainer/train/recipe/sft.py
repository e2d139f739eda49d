"""The recipe: supervised fine-tuning of a LoRA adapter. Read it from top to bottom.

    rows of {prompt: [..., user message], completion: [assistant message]}
      -> the tokenizer's chat template -> token ids, labels = answers and their ends of turn only
      -> frozen base model (16 or 32 bit; 4-bit NF4 for qlora) + trainable low-rank matrices
      -> evaluation, steps of AdamW, evaluation -> adapter_model.safetensors

Nothing is left to a library's default that decides on the result: every hyperparameter is passed
on by name.

    examples    rows as token ids and labels         batches    which rows train together
    packing     rows end to end, proven right        attention  over packed rows on a CPU
    trainer     the Trainer's hooks                  loss       the loss on a CPU
    adapter     which layers get one, and its speed  callback   what is reported while it runs
    early       stopping, and the best adapter       saving     checkpoints
    watch       signs of trouble on the way          pairing    do answers follow from questions
    figures     what it all comes to
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import cast

import torch
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from trl.trainer.sft_config import SFTConfig

from finetune_trainer.contract import Notice, Reason, StageError
from finetune_trainer.model.loading import (
    compute_dtype,
    device_name,
    load_model,
    use_available_cpus,
)
from finetune_trainer.model.tokenizer import load_tokenizer
from finetune_trainer.runtime.progress import Reporter
from finetune_trainer.train.link.channel import Channel
from finetune_trainer.train.link.processes import is_first
from finetune_trainer.train.link.work import Trained, Work, write_lengths
from finetune_trainer.train.recipe import pairing, ranks, saving, trackers, unsloth_engine
from finetune_trainer.train.recipe.adapter import lora_config, trim
from finetune_trainer.train.recipe.callbacks import BestAdapter, ProgressReport, Watch
from finetune_trainer.train.recipe.curves import evaluations_of
from finetune_trainer.train.recipe.data import Examples, check, tokenize
from finetune_trainer.train.recipe.packing import prepare_packing
from finetune_trainer.train.recipe.record import Run, history, measured
from finetune_trainer.train.recipe.trainer import Data, RecipeTrainer

log = logging.getLogger(__name__)


def fine_tune(work: Work, reporter: Reporter, channel: Channel | None = None) -> Trained:
    """Train on the rows of `work.examples`; adapter and tokenizer go to `work.adapter`."""
    config, settings = work.config, work.config.training
    use_available_cpus()
    log.info("Device: %s", device_name())
    log.info("Model: %s (%s)", config.model.source, settings.method)
    reporter.message("Tokenizing the examples")
    tokenizer = load_tokenizer(work.model, trust_remote_code=config.model.trust_remote_code)
    examples, held_out = read_examples(work, tokenizer)
    if is_first():
        write_lengths(work.room, examples.lengths)
    epochs = resolve_epochs(settings.epochs, len(examples))

    reporter.message("Loading the base model")
    model = load(work)
    parameters = base_parameters(model)
    trainer = build_trainer(
        model,
        tokenizer,
        Data(examples, held_out, packed=settings.packing and prepare_packing(model)),
        work=work,
        epochs=epochs,
    )
    notify = channel.notice if channel else None
    best = best_adapter(trainer, work, notify)
    trainer.add_callback(ProgressReport(reporter, trainer.schedule.tokens))
    trainer.add_callback(Watch(notify, settings))
    trainable = trainable_parameters(cast("torch.nn.Module", trainer.model))
    share = f"{trainable:,} / {parameters:,} ({trainable / parameters:.4%})"
    log.info("Trainable parameters / base parameters: %s", share)
    log.info("Training examples: %d, epochs: %d", len(examples), epochs)

    reporter.message("Training")
    run = train(trainer, work, channel, best)
    if (notice := pairing.look(trainer, work, tokenizer)) and notify:
        notify(notice)
    save_adapter(trainer, tokenizer, work)
    counts = {"trainable_parameters": float(trainable), "base_parameters": float(parameters)}
    return Trained(
        metrics=measured(trainer, run, best).model_copy(update=counts).rounded(),
        hyperparameters={**settings.model_dump(mode="json"), "epochs": epochs},
        history=history(trainer),
    )


def load(work: Work) -> PreTrainedModel:
    """The base model; with Unsloth it has its adapter already."""
    if work.engine == "unsloth":
        return cast("PreTrainedModel", unsloth_engine.load(work, compute_dtype()))
    return load_model(
        work.model,
        compute_dtype(),
        ranks.loading_device(work.plan),
        quantize=work.config.training.method == "qlora",
        trust_remote_code=work.config.model.trust_remote_code,
    )


def base_parameters(model: PreTrainedModel) -> int:
    """Parameters of the base model, also where they are held in 4 bits or beside an adapter."""
    adapter = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    return model.num_parameters() - adapter


def read_examples(
    work: Work, tokenizer: PreTrainedTokenizerBase
) -> tuple[Examples, Examples | None]:
    """Training and held-out rows as tokens; StageError when they can't teach what they should."""
    cache = work.room / "tokens"
    examples = tokenize(work.examples, tokenizer, work.max_sequence_length, cache)
    shortened = work.max_sequence_length < work.config.training.max_sequence_length
    check(examples, shortened=shortened)
    if work.held_out is None:
        return examples, None
    return examples, tokenize(work.held_out, tokenizer, work.max_sequence_length, cache)


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
    data: Data,
    *,
    work: Work,
    epochs: int,
    callbacks: list[TrainerCallback] | None = None,
) -> RecipeTrainer:
    """Put model, adapter, data and hyperparameters together."""
    lora = work.config.training.lora
    trainer = RecipeTrainer(
        data=data,
        model=model,
        args=arguments(
            work,
            epochs,
            evaluate=data.held_out is not None,
            bf16=model.dtype == torch.bfloat16,
        ),
        processing_class=tokenizer,
        peft_config=None if unsloth_engine.is_loaded() else lora_config(lora, model),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trackers.guard(trainer)
    if model.dtype == torch.bfloat16 and not unsloth_engine.is_loaded():
        trim(cast("torch.nn.Module", trainer.model))
    return trainer


def arguments(work: Work, epochs: int, *, evaluate: bool, bf16: bool) -> SFTConfig:
    """The hyperparameters, by the Trainer's names."""
    settings, plan = work.config.training, work.plan
    gpu = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(work.checkpoints),
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
        # The rows are tokens already, cut to their length; RecipeTrainer orders and packs them.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        shuffle_dataset=False,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        bf16=bf16,
        fp16=False,
        tf32=True if gpu and torch.cuda.get_device_capability() >= (8, 0) else None,
        use_cpu=not gpu,
        **{**ranks.options(plan), **unsloth_engine.options(work)},
        gradient_checkpointing_kwargs={"use_reentrant": False},
        dataloader_num_workers=0,
        dataloader_pin_memory=gpu,
        eval_strategy=("steps" if settings.eval_steps else "epoch") if evaluate else "no",
        eval_steps=settings.eval_steps,
        eval_on_start=evaluate and work.resume_from is None,
        per_device_eval_batch_size=plan.batch_size,
        save_strategy="no",
        **trackers.options(work),
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


def best_adapter(
    trainer: RecipeTrainer, work: Work, notify: Callable[[Notice], None] | None
) -> BestAdapter | None:
    """With training.earlyStopping: what stops the training and keeps the best adapter."""
    settings = work.config.training.early_stopping
    if settings is None:
        return None
    if trainer.data.held_out is None:
        raise StageError(
            Reason.INVALID_CONFIG,
            "training.earlyStopping needs held-out rows, and there are none.",
        )
    model = cast("torch.nn.Module", trainer.model)
    best = BestAdapter(model, settings, notify, work.resume_from)
    trainer.add_callback(best)
    return best


def train(
    trainer: RecipeTrainer, work: Work, channel: Channel | None, best: BestAdapter | None
) -> Run:
    """Train to the end and evaluate; StageError when the loss is no number any more."""
    began = time.monotonic()
    result, resumed = saving.train(trainer, work, channel)
    seconds = resumed.seconds + time.monotonic() - began
    if not math.isfinite(result.training_loss):
        raise StageError(
            Reason.TRAINING_DIVERGED,
            f"The loss became {result.training_loss}: lower training.learningRate "
            f"({work.config.training.learning_rate:g}).",
        )
    evaluations = evaluations_of(trainer)
    if trainer.data.held_out and trainer.state.global_step not in evaluations:
        trainer.evaluate()
    if best:
        best.restore(trainer.state.global_step)
    evaluating = sum(entry["eval_runtime"] for entry in evaluations.values())
    return Run(result.training_loss, seconds, seconds - evaluating)


def save_adapter(trainer: RecipeTrainer, tokenizer: PreTrainedTokenizerBase, work: Work) -> None:
    """Write adapter_config.json, adapter_model.safetensors and the tokenizer's files."""
    tuned = cast("PeftModel", trainer.model)
    state = ranks.gathered_state(tuned)
    if not is_first():
        return
    adapter = work.adapter
    # The model as the user named it; PEFT would note the folder that it was fetched to.
    tuned.active_peft_config.base_model_name_or_path = work.config.model.source
    # Else PEFT asks the Hub, by network, whether the embeddings were changed.
    tuned.save_pretrained(str(adapter), state_dict=state, save_embedding_layers=False)
    tokenizer.save_pretrained(adapter)  # its class goes by config.json, which isn't there
    (adapter / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card
    for file in adapter.iterdir():
        file.chmod(0o644)  # safetensors are saved for their owner only
