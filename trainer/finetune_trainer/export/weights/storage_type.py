"""The 16-bit type that a merged model is stored in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from finetune_trainer.outcome import Reason, StageError

FLOAT16_SAFE = 60_000.0  # float16 ends at 65,504; quantizers need some room

_SIXTEEN = (torch.bfloat16, torch.float16)
_WHOLE = (*_SIXTEEN, torch.float32, torch.float64)


def sixteen_bit_type(config: dict[str, Any], tensors: Iterable[torch.Tensor]) -> torch.dtype | None:
    """The type that config.json names, or else that most weights have; None if it has more bits.

    Raises StageError(ModelUnsupported) for weights of fewer bits.
    """
    floating: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if tensor.is_floating_point():
            floating[tensor.dtype] += tensor.nbytes
    narrow = [str(dtype).removeprefix("torch.") for dtype in floating if dtype not in _WHOLE]
    if narrow or config.get("quantization_config"):
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            f"The base model is quantized ({', '.join(narrow) or 'quantization_config'}), and "
            "merging into it would lose accuracy: name the model in 16 bits that it was made of.",
        )
    named = _named(config)
    if named in _SIXTEEN:
        return named
    usual = max(floating, key=lambda dtype: floating[dtype]) if floating else torch.float16
    return usual if usual in _SIXTEEN else None


def _named(config: dict[str, Any]) -> torch.dtype | None:
    for part in (config, config.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):  # the newer name and the older
            if isinstance(part.get(key), str):
                dtype = getattr(torch, part[key].removeprefix("torch."), None)
                return dtype if isinstance(dtype, torch.dtype) else None
    return None
