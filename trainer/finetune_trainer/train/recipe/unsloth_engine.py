"""Unsloth: its import, how it loads a model, and what to do where it fails.

Written against Unsloth 2026.10's own source. It needs a GPU even to load a model, so tests cover
only its import and what surrounds it. Whatever it raises before a step is complete lets the worker
start over with the transformers engine, unless memory or disk are full.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.model.shape import context_length
from finetune_trainer.runtime.lifecycle import explain
from finetune_trainer.train.link import TrainingWork, fallback_notice, trained_steps

if TYPE_CHECKING:
    import torch

    from finetune_trainer.train.link import Channel
    from finetune_trainer.train.recipe.trainer import Batch

FAILED_VARIABLE = "FINETUNE_UNSLOTH_FAILED"  # in the environment of a process that starts over
OTHER_CAUSES = (Reason.OUT_OF_GPU_MEMORY, Reason.OUT_OF_MEMORY, Reason.OUT_OF_DISK)

log = logging.getLogger(__name__)


class UnslothFailedError(Exception):
    """Unsloth can't be imported, can't load the model or can't train it."""


def import_first(workdir: Path) -> None:
    """Import Unsloth, which changes transformers, TRL and PEFT, ahead of all of them.

    Raises UnslothFailedError.
    """
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # it would ask the Hub for a file
    os.environ.setdefault(
        "UNSLOTH_COMPILE_LOCATION", str(workdir / "unsloth")
    )  # not the current folder
    with explaining("be imported"), contextlib.redirect_stdout(io.StringIO()):
        import unsloth  # noqa: F401, PLC0415


def load(work: TrainingWork, dtype: torch.dtype) -> Any:
    """The model with its adapter. Raises UnslothFailedError, or torch's error when memory is full.

    Unsloth only computes in another way. Weights, tokenizer, template, data and labels are those of
    the transformers engine.
    """
    settings, lora = work.config.training, work.config.training.lora
    recompute = "unsloth" if work.plan.gradient_checkpointing else False
    with explaining("load the model"), contextlib.redirect_stdout(io.StringIO()):
        from unsloth import FastLanguageModel  # noqa: PLC0415

        from finetune_trainer.model.adapter import Layers, resolve_targets  # noqa: PLC0415

        model, _ = FastLanguageModel.from_pretrained(
            model_name=str(work.model.path),
            max_seq_length=sequence_limit(work),
            dtype=dtype,
            load_in_4bit=settings.method == "qlora",
            use_exact_model_name=True,  # else it takes a 4-bit model of its own from the Hub
            fix_tokenizer=False,
            device_map={"": "cuda:0"},
            use_gradient_checkpointing=recompute,
            random_state=settings.seed,
            max_lora_rank=lora.r,
            local_files_only=True,
        )
        tuned = FastLanguageModel.get_peft_model(
            model,
            r=lora.r,
            target_modules=resolve_targets(lora, Layers.of(model)),
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
            bias="none",
            use_gradient_checkpointing=recompute,
            random_state=settings.seed,
        )
    tuned.register_forward_pre_hook(_pass_row_lengths, with_kwargs=True)
    return tuned


def sequence_limit(work: TrainingWork) -> int:
    """At most what the model was made for.

    Above that, Unsloth stretches the model's positions (linear RoPE scaling), which the export
    knows nothing of: the adapter would fit another model.
    """
    return min(work.max_sequence_length, context_length(work.model.path) or sys.maxsize)


def row_lengths(positions: torch.Tensor) -> torch.Tensor | None:
    """Lengths of packed rows, from positions [1, time] that begin at 0 again with each row."""
    import torch  # noqa: PLC0415 - not in the stage

    if positions.dim() != 2 or positions.shape[0] != 1:
        return None
    starts = (positions[0] == 0).nonzero().flatten()
    if starts.numel() == 0 or int(starts[0]) != 0:
        return None
    return torch.diff(starts, append=starts.new_tensor([positions.shape[1]])).to(torch.int32)


def loss(
    model: torch.nn.Module, batch: Batch, labels_in_step: torch.Tensor | int | None
) -> torch.Tensor:
    """Unsloth's own loss. Its kernel never makes all logits."""
    found: torch.Tensor = model(**batch, num_items_in_batch=labels_in_step, use_cache=False).loss
    return found


def restart_with_transformers(
    work: TrainingWork, cause: UnslothFailedError, channel: Channel
) -> None:
    """Start this process over, since what Unsloth has changed in the libraries can't be undone.

    It never returns.
    """
    if work.config.training.engine == "unsloth":
        channel.notice(fallback_notice(f"Unsloth can't {cause}"))
    os.environ[FAILED_VARIABLE] = "1"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - this program


def or_transformers(work: TrainingWork) -> TrainingWork:
    """The same work by the transformers engine, where this process was started over."""
    failed = FAILED_VARIABLE in os.environ
    return work.model_copy(update={"engine": "transformers"}) if failed else work


@contextlib.contextmanager
def until_first_step(work: TrainingWork, steps: Callable[[], int]) -> Iterator[None]:
    """With this engine, its errors before a step is complete become an UnslothFailedError.

    Its kernels are compiled in the first forward and backward pass, and fail there. `steps` says
    how many steps are complete, also of those before a resume.
    """
    if work.engine != "unsloth":
        yield
        return
    begun = trained_steps(work.resume_from)
    try:
        yield
    except Exception:
        if steps() > begun:
            raise
        with explaining("train the model"):
            raise


@contextlib.contextmanager
def explaining(what: str) -> Iterator[None]:
    """Turn what Unsloth raises into an UnslothFailedError, unless something else is the cause."""
    try:
        yield
    except (StageError, UnslothFailedError) as error:
        if isinstance(error, UnslothFailedError) or error.reason is not Reason.INTERNAL_ERROR:
            raise
        raise UnslothFailedError(f"{what}: {error.message}") from error
    except Exception as error:  # it raises whatever its checks and patches stumble upon
        if explain(error).reason in OTHER_CAUSES:
            raise
        log.warning("Unsloth can't %s", what, exc_info=True)
        first = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise UnslothFailedError(f"{what}: {first}") from error


def _pass_row_lengths(
    _model: torch.nn.Module, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # Its attention doesn't look at positions.
    positions = options.get("position_ids")
    if positions is not None and (lengths := row_lengths(positions)) is not None:
        options = {**options, "packed_seq_lengths": lengths}
    return args, options
