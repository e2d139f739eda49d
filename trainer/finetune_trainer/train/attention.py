"""Attention over rows that lie end to end, for CPUs: each row sees itself only, causally.

PyTorch's kernel would compute the whole square of a packed sequence under a mask, and takes most
of its time in bfloat16 without AMX where rows are short. Here the scores are computed row by row,
a block of queries against the keys that it may see, with ordinary matrix products; probabilities
are computed again in the backward pass instead of being kept, so memory stays linear in the row.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

NAME = "packed_rows"  # as models' attn_implementation
BLOCK = 128  # queries at once; 64 to 128 measured fastest, their scores stay in the L2 cache
KINDS = {"full_attention", "sliding_attention"}  # what can be computed here

Bounds = list[tuple[int, int]]


def register() -> None:
    """Make it known to transformers, which then neither builds nor passes a mask."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def computes(config: Any) -> bool:
    """Whether a model's layers attend in a way that can be computed here."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or KINDS)
    special = ("attn_logit_softcapping", "attention_dropout", "attention_chunk_size")
    return kinds <= KINDS and not any(getattr(text, name, None) for name in special)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, heads, time, size]
    key: torch.Tensor,  # [1, key heads, time, size]
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers; returns [1, time, heads, size].

    `cu_seq_lens_q` are the rows' bounds; left out, there is one row. NotImplementedError for what
    some model wants beyond that.
    """
    special = ("softcap", "s_aux", "position_bias")
    wanted = [name for name in special if others.get(name) is not None]
    if others.get("dropout"):
        wanted.append("dropout")
    if query.shape[0] != 1 or wanted or getattr(module, "is_causal", True) is False:
        raise NotImplementedError(f"packed attention of {query.shape[0]} sequences with {wanted}")
    ends = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _Rows.apply(  # type: ignore[no-untyped-call]
        query[0], key[0], value[0], scale, sliding_window, list(pairwise(ends))
    )
    return out.transpose(0, 1)[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


class _Rows(torch.autograd.Function):
    """Causal attention within each row. Heads that share keys are one matrix product."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes them so
        ctx: Any,
        query: torch.Tensor,  # [heads, time, size]
        key: torch.Tensor,  # [key heads, time, size]
        value: torch.Tensor,
        scale: float,
        window: int | None,
        rows: Bounds,
    ) -> torch.Tensor:
        groups = key.shape[0]
        out = query.new_empty(*query.shape[:2], value.shape[-1])
        for start, end, low in _blocks(rows, window):
            block = query[:, start:end].reshape(groups, -1, query.shape[-1])
            weights = _weights(block, key[:, low:end], scale, end - start, window)
            mixed = torch.bmm(weights.to(value.dtype), value[:, low:end])
            out[:, start:end] = mixed.view(-1, end - start, value.shape[-1])
        ctx.save_for_backward(query, key, value)
        ctx.options = scale, window, rows
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        query, key, value = ctx.saved_tensors
        scale, window, rows = ctx.options
        groups, dtype = key.shape[0], query.dtype
        d_query = torch.empty_like(query)
        d_key, d_value = torch.zeros_like(key), torch.zeros_like(value)
        for start, end, low in _blocks(rows, window):
            block = query[:, start:end].reshape(groups, -1, query.shape[-1])
            above = gradient[:, start:end].reshape(groups, -1, value.shape[-1])
            keys, values = key[:, low:end], value[:, low:end]
            weights = _weights(block, keys, scale, end - start, window)
            d_value[:, low:end] += torch.bmm(weights.to(dtype).transpose(1, 2), above)
            d_weights = torch.bmm(above, values.transpose(1, 2)).float()
            scores = torch._softmax_backward_data(d_weights, weights, -1, torch.float32)
            scores = scores.mul_(scale).to(dtype)
            d_query[:, start:end] = torch.bmm(scores, keys).view(-1, end - start, keys.shape[-1])
            d_key[:, low:end] += torch.bmm(scores.transpose(1, 2), block)
        return d_query, d_key, d_value, None, None, None


def _blocks(rows: Bounds, window: int | None) -> list[tuple[int, int, int]]:
    """Queries from `start` to `end`, and the first key that one of them sees."""
    found = []
    for first, last in rows:
        for start in range(first, last, BLOCK):
            low = first if window is None else max(first, start - window + 1)
            found.append((start, min(start + BLOCK, last), low))
    return found


def _weights(
    query: torch.Tensor, key: torch.Tensor, scale: float, count: int, window: int | None
) -> torch.Tensor:
    """Probabilities in float32 of `count` queries per head, whose last key is their own."""
    scores = torch.bmm(query, key.transpose(1, 2)).float().mul_(scale)
    keys = key.shape[1]
    by_head = scores.view(key.shape[0], -1, count, keys)
    by_head[..., keys - count :].add_(_later(count))
    if window is not None and keys > window:
        by_head.add_(_earlier(count, keys, window))
    return torch.softmax(scores, dim=-1)


@lru_cache(maxsize=BLOCK)
def _later(count: int) -> torch.Tensor:
    """Minus infinity above the diagonal: keys behind the query."""
    return torch.full((count, count), -torch.inf).triu(1)


@lru_cache(maxsize=16)
def _earlier(count: int, keys: int, window: int) -> torch.Tensor:
    """Minus infinity for keys that have left the window."""
    own = torch.arange(keys - count, keys)[:, None]
    return torch.zeros(count, keys).masked_fill_(torch.arange(keys) <= own - window, -torch.inf)
