"""What a LoRA adapter does to one weight, with the order of operations of PEFT's merge.

    LoRA    W + s B A
    DoRA    m (W + s B A) / |W + s B A|       with the norm of each row

in float32, whatever the types on disk. A merge of a part of the rows gives the bits of a merge of
all: matrix products give a row the same bits in every block of enough rows (ALIGNED; measured with
MKL, which has other kernels for fewer than eight).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ALIGNED = 64  # rows


@dataclass(frozen=True)
class Delta:
    """The adapter of one weight W of shape (out, in)."""

    a: torch.Tensor
    """(r, in)"""

    b: torch.Tensor
    """(out, r)"""

    scale: float
    """s: alpha / r, or alpha / sqrt(r) with rsLoRA."""

    magnitude: torch.Tensor | None = None
    """m of DoRA: (out,)"""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it changes."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """Everything that was learnt."""
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)

    def merge(self, base: torch.Tensor, start: int) -> torch.Tensor:
        """The merged rows in float32; `base` are rows of W from `start` on."""
        stop = start + base.shape[0]
        low, high = _enough_rows(start, stop, self.b.shape[0])
        total = self.b[low:high].float() @ self.a.float()
        total = total[start - low : stop - low].mul_(self.scale).add_(base)
        if self.magnitude is not None:
            norm = torch.linalg.norm(total, dim=1)
            total.mul_((self.magnitude[start:stop].float() / norm).unsqueeze(1))
        return total


def _enough_rows(start: int, stop: int, rows: int) -> tuple[int, int]:
    """The rows to compute so that `start` to `stop` get the bits that they have among all."""
    low = start // ALIGNED * ALIGNED
    high = min(-(-stop // ALIGNED) * ALIGNED, rows)
    if high - low < ALIGNED:  # the last few rows
        low = max(0, low - ALIGNED)
    return low, high
