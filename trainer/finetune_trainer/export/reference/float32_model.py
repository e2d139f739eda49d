"""A model that computes in float32 from weights that stay in their files.

transformers maps safetensors into memory; a 16-bit model takes no memory of its own until
somebody converts it. Here nobody does: each weight is a `MappedWeight`, which says that it is
float32 and converts the rows that a computation asks for, a block at a time. So the memory of a
forward pass is that of its activations, whatever the model's size.

The modules are those of transformers and PEFT, so hooks work on them as on any model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from finetune_trainer.model.loading import load_model

BLOCK_VALUES = 1 << 24
"""Values of a weight that are float32 at a time: 64 MiB."""


class MappedWeight(torch.Tensor):
    """A float32 tensor whose values are made of another one, of any floating type, when read.

    Linear layers and embeddings read it by blocks; every other operation gets it whole, in
    float32. It can't be trained.
    """

    source: torch.Tensor

    @staticmethod
    def __new__(cls, source: torch.Tensor) -> MappedWeight:
        """Wrap `source`, which is read and never written."""
        made: MappedWeight = torch.Tensor._make_wrapper_subclass(
            cls, source.shape, dtype=torch.float32, device=source.device, requires_grad=False
        )
        made.source = source
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Linear layers and embeddings by blocks, the rest as ever."""
        blockwise = _BLOCKWISE.get(func)
        if blockwise is not None:
            return blockwise(*args, **(kwargs or {}))
        del types
        with torch._C.DisableTorchFunctionSubclass():  # what comes out is an ordinary tensor
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch calls it with the class and function
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Any other operation works on the whole tensor in float32."""
        del types
        if func is torch.ops.aten.detach.default:
            return MappedWeight(args[0].source)
        args, kwargs = tree_map(_whole, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


def _whole(value: Any) -> Any:
    return value.source.float() if isinstance(value, MappedWeight) else value


def _linear(
    x: torch.Tensor, weight: MappedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x·Wᵀ + b, where W (out, in) is converted by blocks of rows."""
    source = weight.source
    out = x.new_empty((*x.shape[:-1], source.shape[0]))
    rows = max(1, BLOCK_VALUES // source.shape[1])
    for start in range(0, source.shape[0], rows):
        block = source[start : start + rows].float()
        out[..., start : start + rows] = torch.nn.functional.linear(x, block)
    return out if bias is None else out.add_(bias)


def _embedding(ids: torch.Tensor, weight: MappedWeight, *_: Any, **__: Any) -> torch.Tensor:
    """The rows of the tokens; further arguments of torch's embedding concern the training."""
    return weight.source[ids].float()


_BLOCKWISE: dict[Callable[..., Any], Callable[..., torch.Tensor]] = {
    torch.nn.functional.linear: _linear,
    torch.nn.functional.embedding: _embedding,
}


def load_streamed(
    base: Path, adapter: Path | None, *, trust_remote_code: bool = False
) -> PreTrainedModel | PeftModel:
    """The base model, with the adapter beside it unmerged if there is one, ready to evaluate.

    Raises StageError(ModelUnsupported) when transformers can't load the base model.
    """
    model = load_model(base, "auto", "cpu", trust_remote_code=trust_remote_code)
    _compute_in_float32(model)
    tuned = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    tuned.train(False)
    return tuned


@torch.no_grad()
def _compute_in_float32(model: PreTrainedModel) -> None:
    seen: dict[int, torch.nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_floating_point():
                continue
            if id(parameter) not in seen:
                seen[id(parameter)] = _in_float32(parameter)
            module._parameters[name] = seen[id(parameter)]
    _compute_buffers_anew(model)
    model.config.dtype = torch.float32


def _in_float32(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    # Of the small ones (norms, biases) all operations read all, time and again.
    data = parameter.data
    value = MappedWeight(data) if data.dim() > 1 else data.float()
    return torch.nn.Parameter(value, requires_grad=False)


def _compute_buffers_anew(model: PreTrainedModel) -> None:
    """Let the model compute its constants in float32, such as Gemma 3's scale of embeddings.

    In a 16-bit model they are rounded to its type. Parameters are marked as loaded, so that the
    initialisation leaves them alone.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    for module in model.modules():
        rounded = [n for n, b in module._buffers.items() if b is not None and _is_16_bit(b)]
        for name in rounded:
            module._buffers[name] = cast("torch.Tensor", module._buffers[name]).float()
        if rounded:
            cast("Any", model)._init_weights(module)


def _is_16_bit(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)
