"""PyTorch's kernel for rows of different length, which runs on GPUs only, as plain attention."""

from __future__ import annotations

from itertools import pairwise

import torch


def plain_varlen_attn(  # noqa: PLR0917 - as the kernel has them
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Of [time, heads, size], by what torch.nn.attention.varlen says of each argument.

    It refuses what the kernel refuses.
    """
    assert cu_seq_k is not None
    assert cu_seq_q.dtype is cu_seq_k.dtype is torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert isinstance(max_q, int)
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert int(cu_seq_q[-1]) == query.shape[0] == key.shape[0] == value.shape[0]
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    assert all(part.stride(-1) == 1 for part in (query, key, value))
    assert enable_gqa or query.shape[1] == key.shape[1]
    left, right = window_size
    assert right == 0, "causal"
    heads = query.shape[1] // key.shape[1]
    parts = []
    for start, end in pairwise(cu_seq_q.tolist()):
        row = query[start:end].transpose(0, 1).float()
        keys, values = (
            part[start:end].transpose(0, 1).float().repeat_interleave(heads, 0)
            for part in (key, value)
        )
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (distance >= 0) & ((distance <= left) | (left < 0))
        scores = row @ keys.transpose(1, 2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        parts.append((weights @ values).transpose(0, 1))
    return torch.cat(parts).to(query.dtype)
