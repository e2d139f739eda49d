"""What is trained: parameters, those of the adapter or of the model; and what makes it faster."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch.nn.functional import linear
from transformers import PreTrainedModel

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.model.adapter import ADAPTER_WEIGHTS
from finetune_trainer.model.shape import of_text
from finetune_trainer.train.recipe.packing import (
    KERNEL_TYPES,
    ROUGH_TOLERANCE,
    TOLERANCE,
    deviation,
    few_layers,
)
from finetune_trainer.train.recipe.processes import is_first

RANDOM_BITS = 16  # for each value

log = logging.getLogger(__name__)


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


# --- Adapters as one operation, on a GPU ----------------------------------------------------------

ADAPTER_TOLERANCE = 0.02  # of an output's spread: 16 bits are off by some 0.003
TRIED_WIDTHS, TRIED_TOKENS = (64, 48), 16  # of the layer that it is tried on, and of the row


class LowRankProduct(torch.autograd.Function):
    """B A dropout(x), scaled, of which only x and the inner product are kept.

    Layers that read the same x keep it once. The backward pass draws dropout's numbers again, from
    where the generator stood. The scale is applied to the inner product, which is narrow.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes them so
        ctx: Any,
        x: torch.Tensor,  # [..., inputs]
        a: torch.Tensor,  # [rank, inputs]
        b: torch.Tensor,  # [outputs, rank]
        scaling: float,
        dropout: torch.nn.Module,
    ) -> torch.Tensor:
        ctx.scaling, ctx.dropout = scaling, dropout
        ctx.generator = _generator_state(x.device)
        inner = linear(dropout(x), a).mul_(scaling)
        ctx.save_for_backward(x, a, b, inner)
        return linear(inner, b)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, a, b, inner = ctx.saved_tensors
        above = gradients[0].flatten(0, -2)  # [tokens, outputs]
        d_inner = (above @ b).mul_(ctx.scaling)
        again = x.detach().requires_grad_()
        with _replayed(x.device, ctx.generator), torch.enable_grad():
            dropped = ctx.dropout(again)
        d_a = d_inner.t() @ dropped.detach().flatten(0, -2)
        d_x = (d_inner @ a).view_as(x)
        if dropped is not again:
            (d_x,) = torch.autograd.grad(dropped, again, d_x)
        return d_x, d_a, above.t() @ inner.flatten(0, -2), None, None


def _generator_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def _replayed(device: torch.device, state: torch.Tensor) -> Iterator[None]:
    """While the block runs, random numbers come as they did from that state on."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        if cuda:
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield


def fuse_adapters(model: torch.nn.Module, device: str) -> bool:
    """Let LoRA layers compute their adapters as one operation, where it is right on this device.

    Only for a model that computes in 16 bits under autocast. DoRA and whatever else is no plain
    adapter of a linear layer stay as they are.
    """
    layers = [layer for layer in model.modules() if _is_plain(layer)]
    right = bool(layers) and adapters_are_right(device, layers[0])
    for layer in layers if right else ():
        _fuse(layer)
    log.info("Adapters: %s", "one operation" if right else "PEFT's own")
    return right


def _is_plain(layer: torch.nn.Module) -> bool:
    names = {"Linear", "Linear4bit"}
    if not isinstance(layer, LoraLayer) or type(layer).__name__ not in names:
        return False
    if getattr(layer, "lora_variant", None):
        return False
    return all(module.bias is None for module in layer.lora_B.values())


def _fuse(layer: Any) -> None:
    plain = layer.forward

    def forward(x: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        name, *more = layer.active_adapters
        special = bool(more or others or options) or layer.disable_adapters or layer.merged
        if special or x.dtype not in KERNEL_TYPES or not torch.is_grad_enabled():
            found: torch.Tensor = plain(x, *others, **options)
            return found
        found = layer.base_layer(x)
        a, b = (each[name].weight.to(x.dtype) for each in (layer.lora_A, layer.lora_B))
        dropout, scaling = layer.lora_dropout[name], layer.scaling[name]
        added: torch.Tensor = LowRankProduct.apply(x, a, b, scaling, dropout)  # type: ignore[no-untyped-call]
        return found + added

    layer.forward = forward


def adapters_are_right(device: str, like: Any) -> bool:
    """Whether a layer with the rank, scale and dropout of another has the same output and gradients
    with its adapter as one operation, within rounding."""
    numbers = torch.random.fork_rng(devices=[torch.device(device)] if device == "cuda" else [])
    try:
        with numbers:  # those of the training stay as they are
            layer = _layer_like(like, device)
            before = _output_and_gradients(layer)
            _fuse(layer)
            after = _output_and_gradients(layer)
        off = max(deviation(after[key], before[key]) for key in before)
    except Exception as error:  # whatever a device can't do; PEFT's own way stays
        log.warning("Adapters as one operation are left out: %s", error)
        return False
    if off > ADAPTER_TOLERANCE:
        log.warning("Adapters as one operation are left out: they are off by %.1g", off)
    return off <= ADAPTER_TOLERANCE


def _layer_like(like: Any, device: str) -> Any:
    """A small layer in bfloat16 with an adapter of that rank, scale and dropout."""
    name = like.active_adapters[0]
    inputs, outputs = TRIED_WIDTHS
    base = torch.nn.Sequential(torch.nn.Linear(inputs, outputs, bias=False))
    config = LoraConfig(r=like.r[name], target_modules=["0"])
    dtype = torch.get_autocast_dtype(torch.device(device).type)
    made = get_peft_model(cast("PreTrainedModel", base.to(device, dtype)), config)
    layer: Any = next(each for each in made.modules() if isinstance(each, LoraLayer))
    layer.cast_input_dtype_enabled = False
    (own,) = layer.active_adapters
    layer.scaling[own], layer.lora_dropout[own] = like.scaling[name], like.lora_dropout[name]
    torch.nn.init.normal_(layer.lora_B[own].weight, std=0.1)
    return layer


def _output_and_gradients(layer: Any) -> dict[str, torch.Tensor]:
    """Of random tokens, in float32."""
    base = layer.base_layer.weight
    torch.manual_seed(0)
    shape = 1, TRIED_TOKENS, base.shape[1]
    x = torch.randn(shape, device=base.device, dtype=base.dtype, requires_grad=True)
    layer.zero_grad()
    with torch.autocast(base.device.type, base.dtype):
        found = layer(x)
    found.float().pow(2).sum().backward()
    gradients = {n: p.grad.float() for n, p in layer.named_parameters() if p.grad is not None}
    return {"output": found.detach().float(), "input": cast("Any", x.grad).float(), **gradients}


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
