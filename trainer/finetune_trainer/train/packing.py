"""How a model attends to packed rows, proven on the model itself before it trains.

Packing is right when a row's logits don't depend on the row before it, and are those that it gets
alone. Whether that holds depends on the architecture, its attention function and the version of
transformers, so it is measured on two short rows. Where no way passes, rows are padded instead.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from finetune_trainer.train import attention
from finetune_trainer.train.batches import PackingCollator
from finetune_trainer.train.distributed import is_first

LENGTHS = 7, 5
# Mean deviations, as a share of the logits' spread.
LEAK = 1e-3  # from another row before it: mostly exactly 0, in every type
TOLERANCE, ROUGH_TOLERANCE = 1e-3, 0.1  # from the row alone, in float32 and in 16-bit types

log = logging.getLogger(__name__)


def prepare_packing(model: PreTrainedModel) -> bool:
    """Let the model attend to packed rows in the fastest way that is right; False when none is.

    Several processes follow the first one, which alone may hold the weights.
    """
    chosen = _choose(model) if is_first() else None
    if dist.is_initialized():
        dist.broadcast_object_list(box := [chosen])
        (chosen,) = box
    if chosen is None:
        log.warning(
            "Rows are padded, not packed: in this model, rows that lie end to end would see each "
            "other"
        )
        return False
    if chosen == attention.NAME:
        attention.register()  # in each process
    model.set_attn_implementation(chosen)
    log.info("Rows are packed (attention: %s)", chosen)
    return True


def _choose(model: PreTrainedModel) -> str | None:
    before = model.config._attn_implementation
    try:
        alone = _logits_alone(model)
        found = (name for name in _candidates(model, before) if _is_right(model, name, alone))
        return next(found, None)
    finally:
        model.set_attn_implementation(before)


def _is_right(model: PreTrainedModel, name: str, alone: torch.Tensor) -> bool:
    try:
        model.set_attn_implementation(name)
        packed, other = _logits_packed(model, 0), _logits_packed(model, 1)
    except Exception as error:  # whatever a model's code raises for what it can't do
        log.debug("Packing with the attention %s: %s", name, error)
        return False
    second = slice(LENGTHS[0], None)
    leak, off = deviation(other[second], packed[second]), deviation(packed, alone)
    log.debug("Packing with the attention %s: leak %.1e, deviation %.1e", name, leak, off)
    allowed = TOLERANCE if model.dtype is torch.float32 else ROUGH_TOLERANCE
    return leak < LEAK and off < allowed


def _candidates(model: PreTrainedModel, before: str) -> list[str]:
    names = [before]
    # A model that will be spread over GPUs is still on the CPU.
    if model.device.type == "cpu" and not torch.cuda.is_available():
        if attention.computes(model.config):
            attention.register()
            names.insert(0, attention.NAME)
    elif is_flash_attn_2_available() and model.dtype is not torch.float32:
        names.insert(0, "flash_attention_2")
    return names


def deviation(packed: torch.Tensor, alone: torch.Tensor) -> float:
    """Mean difference of two tensors of logits, as a share of their spread."""
    return float((packed - alone).abs().mean() / alone.std().clamp(min=1e-9))


def _rows(model: PreTrainedModel, first: int) -> list[list[int]]:
    """Two rows of random tokens; `first` chooses the first one."""
    tokens = model.config.get_text_config().vocab_size
    seeds = (first, len(LENGTHS))
    return [
        torch.randint(tokens, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        for length, seed in zip(LENGTHS, seeds, strict=True)
    ]


def _logits_alone(model: PreTrainedModel) -> torch.Tensor:
    rows = [torch.tensor([row], device=model.device) for row in _rows(model, 0)]
    return torch.cat([_logits(model, input_ids=row) for row in rows])


def _logits_packed(model: PreTrainedModel, first: int) -> torch.Tensor:
    rows = [{"input_ids": row, "labels": row} for row in _rows(model, first)]
    batch = PackingCollator(pad=0)(rows)
    del batch["labels"]
    return _logits(model, **send_to_device(batch, model.device))


def _logits(model: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    """[tokens, vocabulary]"""
    training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            logits: torch.Tensor = model(**inputs, use_cache=False).logits
    finally:
        model.train(training)
    return logits[0].float()
