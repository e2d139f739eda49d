"""TRL's SFTTrainer with its own order of rows, its own loss on a CPU, and an exact evaluation."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.data_loader import prepare_data_loader
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from finetune_trainer.model.tokenizer import IGNORED
from finetune_trainer.runtime import perplexity
from finetune_trainer.train.recipe import processes
from finetune_trainer.train.recipe.data import (
    PackingCollator,
    PaddingCollator,
    PassLimits,
    RowLists,
    RowNumbers,
    Schedule,
    StepSampler,
    TokenizedRows,
    fewest_groups,
)

FIRST_SCALE = 1024.0

Batch = dict[str, Any]
"""What a collator makes: input_ids and labels of [rows, time], and what goes with them."""

Loss = Callable[[torch.nn.Module, Batch, torch.Tensor | int | None], torch.Tensor]
"""Of the model on a batch: the sum over labels, divided by the number of labels in the step."""


def answer_loss(model: torch.nn.Module, inputs: Batch, *, some_logits: bool = True) -> torch.Tensor:
    """Sum of the cross entropy over all labels.

    With `some_logits` the model computes logits only where a label is.
    """
    inputs = dict(inputs)
    targets = inputs.pop("labels")[:, 1:]  # [batch, time - 1]: each position predicts the next
    keep = (targets != IGNORED).any(dim=0).nonzero().flatten()
    if some_logits:
        inputs["logits_to_keep"] = keep
    logits = model(**inputs, use_cache=False).logits  # [batch, kept, vocabulary]
    if not some_logits:
        logits = logits[:, keep]
    return cross_entropy(
        logits.flatten(0, 1).float(),
        targets[:, keep].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )


def token_logps(model: torch.nn.Module, inputs: Batch, *, some_logits: bool = True) -> torch.Tensor:
    """Log-probability of each label, [rows, time - 1]; 0 where there is none. See `answer_loss`."""
    inputs = dict(inputs)
    targets = inputs.pop("labels")[:, 1:]
    keep = (targets != IGNORED).any(dim=0).nonzero().flatten()
    if some_logits:
        inputs["logits_to_keep"] = keep
    logits = model(**inputs, use_cache=False).logits
    if not some_logits:
        logits = logits[:, keep]
    losses = cross_entropy(
        logits.flatten(0, 1).float(),
        targets[:, keep].flatten(),
        ignore_index=IGNORED,
        reduction="none",
    )
    whole = torch.zeros(targets.shape, device=targets.device)
    return whole.index_copy(1, keep, -losses.view(len(targets), -1))


def tiled_loss(model: torch.nn.Module, inputs: Batch) -> torch.Tensor:
    """The same by TRL's output layer, tile by tile in Triton, and without its metrics.

    To count those, TRL would wait for the GPU in each pass.
    """
    total: torch.Tensor = model(**inputs, use_cache=False, fused_lm_head=True).log_probs.sum()
    return -total


def computes_some_logits(model: torch.nn.Module) -> bool:
    """Whether the model can be asked for the logits of some positions only."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def runs_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on it; a CPU interprets them, where it is told to."""
    return device.type != "cpu" or os.environ.get("TRITON_INTERPRET") == "1"


def loss_scaler(device: str) -> torch.amp.GradScaler:
    """For float16. PyTorch begins at 65536, and would leave out the first steps of many models."""
    return torch.amp.GradScaler(device, init_scale=FIRST_SCALE)


def hold_in_float32(model: torch.nn.Module) -> None:
    """Hold the trained weights so; TRL rounds qlora's to bfloat16, and small updates are lost."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@dataclass(frozen=True)
class TrainingData:
    """What is trained and evaluated on."""

    examples: TokenizedRows
    held_out: TokenizedRows | None
    packed: bool
    """Whether rows are laid end to end, or padded to the longest."""


class RecipeTrainer(SFTTrainer):
    """Trains on the rows of the schedule, step by step. On a CPU its loss is plain PyTorch."""

    def __init__(
        self,
        *,
        data: TrainingData,
        model: PreTrainedModel,
        args: SFTConfig,
        processing_class: PreTrainedTokenizerBase,
        limits: PassLimits,
        engine_loss: Loss | None = None,
        **options: Any,
    ) -> None:
        """`limits` say how a step is divided into passes.

        `engine_loss` is the engine's own loss, in place of the one of this class.
        """
        self.data = data
        self.limits = limits
        self._engine_loss = engine_loss
        self._some_logits = computes_some_logits(model)
        self.on_pass: Callable[[], None] = lambda: None
        """Called before each forward pass, in training and evaluation."""

        self.fused_head = runs_triton(args.device)
        """Whether TRL's output layer computes the loss in tiles (Triton), or `answer_loss`."""

        collator = PackingCollator if data.packed else PaddingCollator
        super().__init__(
            model=model,
            args=args,
            train_dataset=data.examples.rows,
            eval_dataset=data.held_out.rows if data.held_out else None,
            data_collator=collator(processing_class.pad_token_id),
            processing_class=processing_class,
            **options,
        )
        # Gemma 3n and Gemma 4 say that they take no count of labels, and the Trainer would take the
        # mean of the passes' means. The loss here takes the count, whatever the model says.
        self.model_accepts_loss_kwargs = True
        hold_in_float32(cast("torch.nn.Module", self.model))
        if self.is_fsdp_enabled:
            processes.reduce_in_float32(self.accelerator.state.fsdp_plugin)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler = loss_scaler(self.args.device.type)
        batch = args.per_device_train_batch_size * args.world_size
        self.schedule = Schedule(data.examples.lengths, batch, args.seed)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The rows of the schedule, split between the processes. A batch is a step's passes."""
        sampler = StepSampler(self.schedule, self.limits, self.args.process_index, self._epoch)
        return self._loader(RowLists(self.data.examples.rows), sampler, self._collate_passes)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The held-out rows, those of like length together."""
        held_out = self.data.held_out
        # The Trainer passes its own set. Only a set from elsewhere keeps its order.
        if held_out is None or not (eval_dataset is None or eval_dataset is self.eval_dataset):
            return super().get_eval_dataloader(eval_dataset)
        sampler = EvaluationSampler(held_out, self.limits, self.args.process_index)
        return self._loader(held_out.rows, sampler, self.data_collator)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], _: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The next step's passes, as the one batch that the Trainer knows of, and its labels."""
        passes = next(epoch_iterator)
        return [passes], self._get_num_items_in_batch(passes, device)

    def training_step(  # type: ignore[override] # a batch is a list here
        self,
        model: torch.nn.Module,
        inputs: list[Batch],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """All passes of a step. Gradients are exchanged with the last one."""
        self.current_gradient_accumulation_steps = len(inputs)
        losses: list[torch.Tensor] = []
        one_pass: Any = super().training_step
        for left, batch in zip(reversed(range(len(inputs))), inputs, strict=True):
            with self.accelerator.no_sync(model) if left else nullcontext():
                losses.append(one_pass(model, batch, num_items_in_batch))
        loss = torch.stack(losses).sum()
        # What logging_nan_inf_filter does, without waiting for the GPU to know the number.
        steps = 1 + self.state.global_step - self._globalstep_last_logged
        return torch.where(loss.isfinite(), loss, self._tr_loss / steps)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Sum of the cross entropy over the labels, divided by their number in the whole step."""
        self.on_pass()
        if self._engine_loss:
            return self._engine_loss(model, inputs, num_items_in_batch)
        if self.fused_head and self.aux_loss_enabled:  # experts whose configuration asks for it
            return super().compute_loss(  # type: ignore[no-untyped-call]
                model, inputs, return_outputs, num_items_in_batch
            )
        assert not return_outputs, "the evaluation below asks for the loss only"  # noqa: S101
        labels = (inputs["labels"][:, 1:] != IGNORED).sum()
        count = labels if num_items_in_batch is None else num_items_in_batch
        if self.fused_head:
            total = tiled_loss(model, inputs)
        else:
            total = answer_loss(model, inputs, some_logits=self._some_logits)
        loss = total / torch.as_tensor(count).clamp(min=1)
        # The count is that of all processes, whose gradients will be averaged.
        return loss * (1 if num_items_in_batch is None else self.args.world_size)

    def token_logps(self, model: torch.nn.Module, inputs: Batch) -> torch.Tensor:
        """Log-probability of each label, by the same output layer as the loss."""
        if self.fused_head:
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
            return cast("torch.Tensor", outputs.log_probs)
        return token_logps(model, inputs, some_logits=self._some_logits)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what is trained. Of a model spread over processes, gather that and no more."""
        model = cast("torch.nn.Module", self.model)
        state = processes.gathered_state(model)
        if not isinstance(model, PeftModel):
            if self.args.should_save:
                save_weights(model, state, Path(output_dir or str(self.args.output_dir)))
        elif state is None:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Of a model spread over processes, write what one process would."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        write, folder = self.args.should_save, Path(output_dir)
        save_optimizer(*self._parts(), folder, write=write)
        if write:
            torch.save(cast("Any", self.lr_scheduler).state_dict(), folder / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load to the CPU; with several processes the Trainer would load to the device."""
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        parts: dict[str, Any] = {SCHEDULER_NAME: self.lr_scheduler}
        if self.is_fsdp_enabled:
            load_optimizer(*self._parts(), folder)
        else:
            parts[OPTIMIZER_NAME] = self.optimizer
        for name, part in parts.items():
            # Mapped into memory where it is copied to a device anyway: it may be of a whole model.
            mapped = self.args.device.type != "cpu"
            saved = torch.load(folder / name, map_location="cpu", weights_only=True, mmap=mapped)
            part.load_state_dict(saved)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        weights, folder = self._parts()[0], Path(resume_from_checkpoint)
        if self.is_fsdp_enabled:
            load_sharded(weights, folder)
        elif not isinstance(weights, PeftModel):
            load_weights(weights, folder)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _parts(self) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        """Model and optimizer without what accelerate wraps around the latter."""
        optimizer: Any = self.optimizer
        return cast("torch.nn.Module", self.model), getattr(optimizer, "optimizer", optimizer)

    def floating_point_ops(self, _inputs: Any) -> int:
        """Count none. The Trainer's estimate goes over all parameters at each step."""
        return 0

    def store_flos(self) -> None:
        """Do nothing. Nobody reads the sum, and every process would have to take part in it before
        a checkpoint is written, also one that has failed."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Do nothing. TRL would write one with every checkpoint."""

    def evaluation_loop(self, dataloader: DataLoader[Any], *_: Any, **options: Any) -> Any:
        """Take the mean over all labels of the held-out rows, not that of the batches' means."""
        prefix = options.get("metric_key_prefix", "eval")
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch in dataloader:
            mean, count = self.mean_loss(batch)
            sums += torch.stack([mean.double() * count, count.double()])
        total, labels = self.accelerator.reduce(sums, reduction="sum").tolist()
        loss = total / max(labels, 1)
        return EvalLoopOutput(
            predictions=(),  # type: ignore[arg-type]
            label_ids=None,
            metrics={
                f"{prefix}_loss": loss,
                f"{prefix}_perplexity": perplexity(loss),
                f"{prefix}_tokens": labels,
            },
            num_samples=len(self.data.held_out or ()),
        )

    def mean_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean over the labels of a batch as the collator makes it, and how many there are."""
        model = cast("torch.nn.Module", self.model)
        model.eval()
        inputs = self._prepare_inputs(batch)
        with torch.no_grad(), self.compute_loss_context_manager():
            mean = self.compute_loss(model, inputs)
        return mean, (inputs["labels"][:, 1:] != IGNORED).sum()

    def _epoch(self) -> int:
        return int(self.state.global_step // self.schedule.steps)

    def _collate_passes(self, passes: list[list[dict[str, Any]]]) -> list[Batch]:
        return [self.data_collator(rows) for rows in passes]

    def _loader(
        self, rows: Any, sampler: Sampler[Any], collate: Callable[[Any], Any]
    ) -> DataLoader[Any]:
        workers = self.args.dataloader_num_workers
        # The sampler knows the processes, so that accelerate must not split the batches again.
        loader = DataLoader(
            rows,
            batch_sampler=sampler,
            collate_fn=collate,
            pin_memory=self.args.dataloader_pin_memory,
            num_workers=workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            multiprocessing_context="fork" if workers else None,
            # Its own, so that an evaluation takes no random numbers from the training's dropout.
            generator=torch.Generator().manual_seed(self.args.seed),
        )
        prepared: DataLoader[Any] = prepare_data_loader(
            loader,
            device=self.args.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            non_blocking=self.args.dataloader_pin_memory,
        )
        return prepared


class EvaluationSampler(Sampler[RowNumbers]):
    """Yields this process's rows, the largest pass first; each process has as many passes."""

    def __init__(self, examples: TokenizedRows, limits: PassLimits, rank: int) -> None:
        order = (-examples.lengths).argsort(kind="stable")
        groups = fewest_groups(examples.lengths[order].tolist(), limits)
        self._passes = [order[group].tolist() for group in groups[rank :: limits.processes]]

    def __len__(self) -> int:
        return len(self._passes)

    def __iter__(self) -> Iterator[RowNumbers]:
        return iter(self._passes)


# --- Checkpoints of a model that is trained itself (full) ----------------------------------------

WEIGHTS = "weights.safetensors"


def trained_weights(
    model: torch.nn.Module, state: Mapping[str, torch.Tensor] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of each weight that is trained, a shared one once; from `state` if given."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter.detach() if state is None else state[name]


def save_weights(
    model: torch.nn.Module, state: Mapping[str, torch.Tensor] | None, folder: Path
) -> None:
    """Write the trained weights by the names that the model has in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: value.contiguous() for name, value in trained_weights(model, state)}
    save_file(values, folder / WEIGHTS)


@torch.no_grad()
def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Take the weights of a checkpoint. RuntimeError when it has other ones."""
    own = dict(trained_weights(model))
    saved = load_file(folder / WEIGHTS)  # mapped into memory
    _check_names(set(own), set(saved), folder / WEIGHTS)
    for name, value in own.items():
        value.copy_(saved[name])


def _check_names(own: set[str], saved: set[str], file: Path) -> None:
    if own != saved:
        raise RuntimeError(f"{file.name} in {file.parent} is not of this model's layers")


# --- A model spread over processes (fsdp) --------------------------------------------------------

ADAPTER = "adapter_model.safetensors"
OPTIMIZER = "optimizer.pt"


def save_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path, *, write: bool
) -> None:
    """Gather Adam's moments of all processes. The one with `write` writes them."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, folder / OPTIMIZER)


def load_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Take this process's part of the moments."""
    state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    set_optimizer_state_dict(model, optimizer, state, options=options)


def load_sharded(model: torch.nn.Module, folder: Path) -> None:
    """Take this process's part of what is trained. RuntimeError when it has other layers."""
    file = folder / (ADAPTER if isinstance(model, PeftModel) else WEIGHTS)
    saved = load_file(file)
    trained = [name for name, _ in trained_weights(model)]
    # PEFT's files leave out the adapter's own name.
    names_in_file = {name: name.replace(".default.", ".") for name in trained}
    _check_names(set(names_in_file.values()), set(saved), file)
    state: dict[str, Any] = {name: saved[short] for name, short in names_in_file.items()}
    options = StateDictOptions(full_state_dict=True, strict=False, ignore_frozen_params=True)
    set_model_state_dict(model, state, options=options)
