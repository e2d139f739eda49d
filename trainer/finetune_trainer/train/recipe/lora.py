"""What is trained: which layers get an adapter, or which weights are; and a faster adapter."""

from __future__ import annotations

import logging

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from finetune_trainer.contract import Lora, Reason, StageError
from finetune_trainer.model.shape import NO_TEXT, of_text, resolve_targets

RANDOM_BITS = 16  # for each value

log = logging.getLogger(__name__)


def lora_config(lora: Lora, model: torch.nn.Module) -> LoraConfig:
    """The adapter: W x + s B A x in each target module, with B = 0 at the start.

    The scale s is alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732). Raises StageError
    where the model lacks a target module.
    """
    linear = linear_layers(model)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        target_modules=target_modules(lora, linear),
        exclude_modules=None if of_text(linear) == linear else NO_TEXT,
        bias="none",
    )


def linear_layers(model: torch.nn.Module) -> list[str]:
    """Names of the modules that can get an adapter."""
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def target_modules(lora: Lora, linear: list[str]) -> list[str]:
    """The last parts of the names of the modules that get an adapter."""
    targets = resolve_targets(lora.target_modules, linear)
    if fused := [f"{found} for {name}" for name, found in targets.items() if name != found]:
        log.info("The model fuses layers: the adapter goes to %s", ", ".join(fused))
    return sorted(set(targets.values()))


def freeze_other_senses(model: torch.nn.Module) -> None:
    """Of a model that is trained itself, leave alone what no text passes through."""
    for name, parameter in model.named_parameters():
        if not of_text([name]):
            parameter.requires_grad_(False)


def count_base_parameters(model: PreTrainedModel) -> int:
    """Parameters of the base model, also where they are held in 4 bits or beside an adapter."""
    adapter = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    return model.num_parameters() - adapter


def count_trainable_parameters(model: torch.nn.Module) -> int:
    """Parameters that the optimizer changes. StageError when there are none."""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if count == 0:
        raise StageError(
            Reason.INVALID_CONFIG,
            "No parameter is trainable: none of training.lora.targetModules is in this model.",
        )
    return count


def make_layers_faster(model: torch.nn.Module) -> None:
    """Let LoRA layers take their input as it is, and drop out faster on a CPU.

    Only for a model that computes in 16 bits under autocast. Autocast casts the adapter's weights
    to the input's type anyway, and PEFT would first copy each input to float32.
    """
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        layer.cast_input_dtype_enabled = False
        for name, module in layer.lora_dropout.items():
            if isinstance(module, torch.nn.Dropout):
                layer.lora_dropout[name] = FastDropout(module.p)


class FastDropout(torch.nn.Module):
    """torch.nn.Dropout with 16 random bits for a value: several times faster on CPUs.

    The share of zeros is that of the spec to within 1/65536.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zero a share of the values, and scale the others up so that the mean stays."""
        if not self.training or x.device.type != "cpu":
            return torch.nn.functional.dropout(x, self.p, self.training)
        values = 1 << RANDOM_BITS
        dropped = round(self.p * values)
        # Whole words of 64 random bits, read as four numbers each.
        words = torch.empty(-(-x.numel() * RANDOM_BITS // 64), dtype=torch.int64)
        numbers = words.random_(-(1 << 63), None).view(torch.int16)[: x.numel()].view(x.shape)
        keep = numbers >= dropped - values // 2
        # Bytes become floats faster than truth values do.
        kept = keep.view(torch.uint8).to(x.dtype)
        return x * kept.mul_(values / (values - dropped))
