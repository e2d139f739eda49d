"""The adapter as it trains: its parameters, and what makes it and the layers around it faster."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import PreTrainedModel

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.model.adapter import ADAPTER_WEIGHTS
from finetune_trainer.train.recipe.packing import (
    ROUGH_TOLERANCE,
    TOLERANCE,
    deviation,
    few_layers,
)
from finetune_trainer.train.recipe.processes import is_first

RANDOM_BITS = 16  # for each value

log = logging.getLogger(__name__)


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


def start_from(model: PeftModel, folder: Path) -> None:
    """Take the weights of an adapter in a folder, which has the same layers and rank.

    Raises StageError(InvalidConfig) where it has others.
    """
    saved = load_file(folder / ADAPTER_WEIGHTS)
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in wanted.items()}:
        raise StageError(
            Reason.INVALID_CONFIG,
            "spec.training.initFrom: the adapter has not the layers and shapes of this training: "
            "set spec.training.lora as it was trained with.",
        )
    set_peft_model_state_dict(model, saved)
    log.info("The training goes on from an adapter with %d tensors", len(saved))


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


def embed_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let the input embedding give its rows in this type, also where it is trained in float32.

    All layers after it would compute in float32 otherwise, or in two types at once.
    """

    def cast(_: torch.nn.Module, __: object, rows: torch.Tensor) -> torch.Tensor:
        return rows.to(dtype)

    model.get_input_embeddings().register_forward_hook(cast)


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


# --- Liger's kernels for the layers, on a GPU ----------------------------------------------------

LIGER = "liger_kernel"
LIGER_TOKENS = 16  # of the row that they are tried on
LIGER_KERNELS = {"fused_linear_cross_entropy": False, "cross_entropy": False}  # the loss is TRL's


def use_liger(model: PreTrainedModel) -> bool:
    """Let Liger's kernels compute norms, positions and gates, on a GPU where it is installed.

    And only where they are right on this GPU, which a few layers with random weights prove. Of
    several processes the first one decides.
    """
    if not torch.cuda.is_available() or find_spec(LIGER) is None:
        return False
    right = is_first() and liger_is_right(model, "cuda")
    if dist.is_initialized():
        dist.broadcast_object_list(box := [right])
        (right,) = box
    if right:
        _apply_liger(model)
    log.info("Layers: %s", "Liger's kernels" if right else "the model's own")
    return right


def liger_is_right(model: PreTrainedModel, device: str) -> bool:
    """Whether logits and gradients are the same with Liger's kernels, within rounding."""
    module = sys.modules[type(model).__module__]
    positions = getattr(module, "apply_rotary_pos_emb", None)
    allowed = TOLERANCE if model.dtype is torch.float32 else ROUGH_TOLERANCE
    try:
        few = few_layers(model, device)
        before = _logits_and_gradients(few)
        _apply_liger(few)
        after = _logits_and_gradients(few)
        off = max(deviation(after[name], before[name]) for name in before)
    except (
        Exception
    ) as error:  # of kernels that are compiled here, and a model that it may not know
        log.warning("Liger's kernels are left out: %s", error)
        return False
    finally:
        if positions is not None:  # it replaces them for all models of this class
            vars(module)["apply_rotary_pos_emb"] = positions
    if off > allowed:
        log.warning("Liger's kernels are left out: they are off by %.1g", off)
    return off <= allowed


def _apply_liger(model: PreTrainedModel) -> None:
    from liger_kernel.transformers import (  # noqa: PLC0415 - not in every image
        _apply_liger_kernel_to_instance,
    )

    _apply_liger_kernel_to_instance(model=model, **LIGER_KERNELS)


def _logits_and_gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Of one row of random tokens, in float32."""
    words = model.config.get_text_config().vocab_size
    dice = torch.Generator().manual_seed(0)
    ids = torch.randint(words, (1, LIGER_TOKENS), generator=dice).to(model.device)
    model.zero_grad()
    found = model(input_ids=ids, labels=ids, use_cache=False)
    torch.autograd.backward(found.loss)
    gradients = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": found.logits.detach().float(), **gradients}
