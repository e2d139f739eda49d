"""The loss in plain PyTorch, for devices that TRL's own kernel does not run on."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from finetune_trainer.base_model.tokenizer import IGNORED


def answer_loss(
    model: torch.nn.Module, inputs: dict[str, Any], *, some_logits: bool = True
) -> torch.Tensor:
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


def computes_some_logits(model: torch.nn.Module) -> bool:
    """Whether the model can be asked for the logits of some positions only."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters
