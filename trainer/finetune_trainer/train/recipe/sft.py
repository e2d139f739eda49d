"""The recipe: supervised fine-tuning of a LoRA adapter, or of all weights. Read it from the top.

    rows of {prompt: [..., user message], completion: [assistant message]}
      -> the tokenizer's chat template -> token ids, labels = answers and their ends of turn only
      -> frozen base model (16 or 32 bit; 4-bit NF4 for qlora) + trainable low-rank matrices
         or, with method full, the model itself in float32
      -> evaluation, steps of AdamW, evaluation -> adapter_model.safetensors or model.safetensors

No library's default decides on the result: the recipe passes every hyperparameter by name.

A row is one example. A step is one update of the trained weights, on as many rows as the effective
batch has (batchSize x gradientAccumulationSteps). The plan splits it into passes and processes, as
memory allows, and never changes which rows are in it. A loss is a mean in nats per answer token.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from peft import PeftModel
from pydantic import JsonValue
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
)
from trl.trainer.sft_config import SFTConfig

from finetune_trainer.contract import Reason, StageError, Training
from finetune_trainer.model.adapter import lora_config
from finetune_trainer.model.loading import (
    compute_dtype_of,
    device_name,
    load_model,
    use_available_cpus,
)
from finetune_trainer.model.tokenizer import load_tokenizer
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.train.link import Channel, Trained, TrainingWork
from finetune_trainer.train.recipe import processes, training_log, unsloth_engine
from finetune_trainer.train.recipe.data import TokenizedRows, check_rows, tokenize
from finetune_trainer.train.recipe.lora import (
    count_base_parameters,
    count_trainable_parameters,
    embed_in,
    freeze_other_senses,
    fuse_adapters,
    make_layers_faster,
    start_from,
    use_liger,
)
from finetune_trainer.train.recipe.packing import pass_limits, prepare_packing
from finetune_trainer.train.recipe.preference import PreferenceTrainer, without_dropout
from finetune_trainer.train.recipe.saving import train_with_checkpoints
from finetune_trainer.train.recipe.trainer import RecipeTrainer, TrainingData, trained_weights
from finetune_trainer.train.recipe.training_log import (
    TrainingTotals,
    begin_memory_peaks,
    evaluations_of,
    history,
    memory_peaks,
    training_metrics,
)
from finetune_trainer.train.recipe.watch import (
    BestAdapter,
    Notify,
    TrainingWatch,
    find_unrelated_answers,
)

log = logging.getLogger(__name__)


def fine_tune(work: TrainingWork, reporter: Reporter, channel: Channel | None = None) -> Trained:
    """Train on the rows of `work.examples`. The result and the tokenizer go to `work.adapter`."""
    settings = work.config.training
    notify = channel.notice if channel else None
    use_available_cpus()
    begin_memory_peaks()
    log.info("Device: %s", device_name())
    log.info("Model: %s (%s)", work.config.model.source, settings.method)

    reporter.message("Tokenizing the examples")
    tokenizer = load_tokenizer(work.model)
    examples, held_out = read_rows(work, tokenizer)
    if channel:
        channel.lengths(examples.longest)
    epochs = resolve_epochs(settings.epochs, len(examples))

    reporter.message("Loading the base model")
    model = load(work)
    base_parameters = count_base_parameters(model)
    packed = settings.packing and prepare_packing(
        model, unsloth=work.engine == "unsloth", compute=computes_in(work, model)
    )
    data = TrainingData(examples, held_out, packed=packed)
    if work.engine != "unsloth":
        use_liger(model)
    with unsloth_engine.until_first_step(work, lambda: 0):
        trainer = build_trainer(model, tokenizer, data, work=work, epochs=epochs)
    best = add_early_stopping(trainer, work, notify)
    trainer.add_callback(training_log.ProgressReport(reporter, trainer.schedule.tokens))
    trainer.add_callback(TrainingWatch(notify, settings, trainer.accelerator.scaler))
    if channel:
        trainer.on_pass = channel.alive
    trainable = count_trainable_parameters(cast("torch.nn.Module", trainer.model))
    share = f"{trainable:,} / {base_parameters:,} ({trainable / base_parameters:.4%})"
    log.info("Trainable parameters / base parameters: %s", share)
    log.info("Training examples: %d, epochs: %d", len(examples), epochs)

    reporter.message("Training")
    totals = train(trainer, work, channel, best)
    if (notice := find_unrelated_answers(trainer, work, tokenizer)) and notify:
        notify(notice)

    save_result(trainer, tokenizer, work)
    best_step = (best.best_step or trainer.state.global_step) if best else None
    counts: dict[str, float | None] = {
        "trainable_parameters": float(trainable),
        "base_parameters": float(base_parameters),
        **memory_peaks(work.plan.device_bytes),
    }
    if work.initial_adapter:  # the evaluation at the start was of that
        counts |= {"base_eval_loss": None, "base_perplexity": None}
    return Trained(
        metrics=training_metrics(trainer, totals, best_step).model_copy(update=counts).rounded(),
        hyperparameters=applied(settings, epochs),
        history=history(trainer),
    )


def read_rows(
    work: TrainingWork, tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenizedRows, TokenizedRows | None]:
    """Training and held-out rows as tokens. StageError when they can't teach what they should."""
    length, settings = work.max_sequence_length, work.config.training
    read = partial(
        tokenize,
        tokenizer=tokenizer,
        max_length=length,
        cache=work.workdir / "tokens",
        objective=settings.objective,
        split_at=settings.max_sequence_length,
    )
    examples = read(work.examples, prepared=work.tokens)
    # Only the memory ladder goes below the spec's length. Rows that lose their answer are then
    # what the spec allows, and not a fault.
    check_rows(examples, shortened=length < settings.max_sequence_length)
    if work.held_out is None:
        return examples, None
    return examples, read(work.held_out, prepared=work.held_out_tokens)


def resolve_epochs(epochs: int | str, rows: int) -> int:
    """Small data needs more passes: `auto` is 5 under 500 rows, 3 up to 5,000 rows, 2 above."""
    if isinstance(epochs, int):
        return epochs
    if rows < 500:
        return 5
    return 3 if rows <= 5000 else 2


def applied(settings: Training, epochs: int) -> dict[str, JsonValue]:
    """The hyperparameters as they were applied, by their names in the spec."""
    # Where it began is a place, in the lineage.
    unused = {"init_from", "lora"} if settings.method == "full" else {"init_from"}
    named = settings.model_dump(mode="json", exclude=unused)
    return {**named, "epochs": epochs, "learningRate": settings.learning_rate}


def load(work: TrainingWork) -> PreTrainedModel:
    """The base model: in float32 if it is trained itself, else frozen later by PEFT.

    From Unsloth it comes with its adapter.
    """
    if work.config.training.method == "full":
        model = load_model(work.model, torch.float32, processes.loading_device(work.plan))
        freeze_other_senses(model)
        return model
    if work.engine == "unsloth":
        return cast("PreTrainedModel", unsloth_engine.load(work, compute_dtype_of(work.model)))
    return load_model(
        work.model,
        compute_dtype_of(work.model),  # 16 bits where the hardware computes in them, else float32
        processes.loading_device(work.plan),
        quantize=work.config.training.method == "qlora",
        sharded=work.plan.parallelism == "fsdp",
    )


def computes_in(work: TrainingWork, model: PreTrainedModel) -> torch.dtype:
    """The type of the activations. Weights that are trained themselves are float32."""
    full = work.config.training.method == "full"
    return compute_dtype_of(work.model) if full else model.dtype


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainingData,
    *,
    work: TrainingWork,
    epochs: int,
) -> RecipeTrainer:
    """Put model, adapter, data and hyperparameters together."""
    unsloth, settings = work.engine == "unsloth", work.config.training
    full = settings.method == "full"
    dtype = computes_in(work, model)
    kind: Callable[..., RecipeTrainer] = RecipeTrainer
    lora = settings.lora
    if settings.objective != "sft":
        kind, lora = partial(PreferenceTrainer, settings=settings), without_dropout(lora)
    trainer = kind(
        data=data,
        model=model,
        args=arguments(work, epochs, evaluate=data.held_out is not None, dtype=dtype),
        processing_class=tokenizer,
        limits=pass_limits(work, model, data.examples.lengths, packed=data.packed),
        peft_config=None if unsloth or full else lora_config(lora, model),
        engine_loss=unsloth_engine.loss if unsloth else None,
    )
    # ProgressReport takes their place.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    training_log.guard_trackers(trainer)
    if model.dtype is not torch.float32 and not unsloth:
        make_layers_faster(cast("torch.nn.Module", trainer.model))
        if torch.cuda.is_available():  # a CPU saves no time by it, and has memory
            fuse_adapters(cast("torch.nn.Module", trainer.model), "cuda")
        if work.config.training.lora.modules_to_save:
            embed_in(cast("PreTrainedModel", trainer.model), model.dtype)
    if work.initial_adapter and work.resume_from is None:
        start_from(cast("PeftModel", trainer.model), work.initial_adapter)
    return trainer


def arguments(work: TrainingWork, epochs: int, *, evaluate: bool, dtype: torch.dtype) -> SFTConfig:
    """The hyperparameters, by the Trainer's names."""
    settings, plan = work.config.training, work.plan
    gpu, sharded = torch.cuda.is_available(), plan.parallelism == "fsdp"
    training_log.set_tracker_variables(work)
    return SFTConfig(
        output_dir=str(work.checkpoints),
        # Optimization. To the Trainer a step is one batch; RecipeTrainer divides it into passes.
        num_train_epochs=epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup_ratio,  # below 1 it is the share of all steps
        per_device_train_batch_size=plan.batch_size * plan.gradient_accumulation_steps,
        gradient_accumulation_steps=1,
        optim="adamw_torch_fused" if gpu else "adamw_torch",
        weight_decay=settings.weight_decay,
        max_grad_norm=1.0,  # the norm over all trained weights
        seed=settings.seed,
        data_seed=settings.seed,
        # Rows. They are tokens already, cut to their length; RecipeTrainer orders and packs them.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        shuffle_dataset=False,
        # A GPU's rows are made ready by a process beside it, two steps ahead.
        dataloader_pin_memory=gpu,
        dataloader_num_workers=int(gpu),
        dataloader_prefetch_factor=2 if gpu else None,
        # Numbers. Weights that are trained stay float32; autocast computes in 16 bits. Gradients
        # in float16 are scaled up, or the small ones would be 0.
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        tf32=True if gpu and torch.cuda.get_device_capability() >= (8, 0) else None,
        use_cpu=not gpu,
        # Memory. Unsloth recomputes activations by itself. With FSDP this is right as well, unlike
        # accelerate's own setting, which draws dropout anew when it recomputes a layer.
        gradient_checkpointing=plan.gradient_checkpointing and work.engine != "unsloth",
        gradient_checkpointing_kwargs={
            "use_reentrant": False,
            **({"every_n_layers": plan.recompute_every} if plan.recompute_every > 1 else {}),
        },
        # Several processes. The loss is one mean over the labels of all of them.
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
        fsdp=True if sharded else None,  # type: ignore[arg-type] # typed for the command line
        fsdp_config=processes.FSDP_CONFIG if sharded else None,
        # Evaluation: of the base model, at each epoch or every evalSteps, and at the end.
        eval_strategy=("steps" if settings.eval_steps else "epoch") if evaluate else "no",
        eval_steps=settings.eval_steps,
        eval_on_start=evaluate and work.resume_from is None,
        per_device_eval_batch_size=plan.batch_size,
        # Logging and saving. CheckpointSaver decides when to save.
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # RecipeTrainer has its own
        save_strategy="no",
        report_to=[tracker.value for tracker in settings.report_to] or "none",
        run_name=training_log.run_name(work.config),
        disable_tqdm=True,
    )


def add_early_stopping(
    trainer: RecipeTrainer, work: TrainingWork, notify: Notify | None
) -> BestAdapter | None:
    """With training.earlyStopping: add what stops the training and keeps the best adapter."""
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
    trainer: RecipeTrainer,
    work: TrainingWork,
    channel: Channel | None,
    best: BestAdapter | None,
) -> TrainingTotals:
    """Train to the end and evaluate. StageError when the loss is no number any more."""
    began = time.monotonic()
    with unsloth_engine.until_first_step(work, lambda: trainer.state.global_step):
        result, resumed = train_with_checkpoints(trainer, work, channel)
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
    return TrainingTotals(result.training_loss, seconds, seconds - evaluating)


def save_result(
    trainer: RecipeTrainer, tokenizer: PreTrainedTokenizerBase, work: TrainingWork
) -> None:
    """Write the adapter or the whole model, with its config, and the tokenizer's files."""
    tuned, folder = cast("PeftModel | PreTrainedModel", trainer.model), work.adapter
    state = processes.gathered_state(tuned)  # every process takes part
    if not processes.is_first():
        return
    if isinstance(tuned, PeftModel):
        # The model as the user named it. PEFT would write the folder that it was fetched to.
        tuned.active_peft_config.base_model_name_or_path = work.config.model.source
        # Else PEFT asks the Hub, by network, whether the embeddings were changed.
        tuned.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    else:
        # In float32, for the export to round. Its settings are the base model's, which the export
        # takes from there: transformers refuses to save some that it loads.
        tuned.generation_config = GenerationConfig()  # type: ignore[no-untyped-call] # transformers
        tuned.save_pretrained(folder, state_dict=dict(trained_weights(tuned, state)))
    tokenizer.save_pretrained(folder)  # an adapter's class goes by config.json, which isn't there
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors are saved for their owner only
