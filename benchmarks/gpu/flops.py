"""Model FLOPs utilization (MFU): how much of the device's arithmetic the training itself asks for.

    MFU = FLOPs that model and adapter need for the tokens / (seconds x peak FLOP/s of the device)

as PaLM defines it (arXiv 2204.02311, appendix B): what is computed twice, padding, and positions
without a label in the output layer don't count. A multiplication and an addition are two FLOPs, so
a matrix of N weights costs a token

    2 N  forward
    2 N  backward, for the gradient of its input
    2 N  backward, for its own gradient, which a frozen matrix doesn't have

that is 4 N for the frozen linear layers and the output layer, and 6 N for the adapter's. Attention
costs a row of s tokens, in each layer of width d: s^2/2 pairs of tokens see each other, the two
products (scores, mixing) take 2 d each forward and twice that backward: 6 d s^2. Embeddings are
looked up. The first layer's input needs no gradient, which is not deducted (1% of a model of 32
layers at most).

Peaks are dense 16-bit figures of NVIDIA's data sheets with accumulation in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from finetune_trainer.contract import Lora
from finetune_trainer.model.shape import Shape

PEAKS = (
    # Part of torch's name of the device, and its peak in TFLOP/s; the first one that fits.
    ("B300", 2250.0),
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("T4", 65.0),
    ("V100", 125.0),
)


@dataclass(frozen=True)
class Work:
    """What was trained on."""

    tokens: int
    labels: int
    squares: int
    """Sum of the squares of the rows' lengths."""

    @classmethod
    def of(cls, lengths: Iterable[int], labels: Iterable[int]) -> Work:
        sizes = list(lengths)
        return cls(sum(sizes), sum(labels), sum(size * size for size in sizes))


def model_flops(shape: Shape, lora: Lora, work: Work) -> float:
    """What a training of an adapter needs for this work."""
    head = shape.vocabulary * shape.hidden
    linear = 4 * shape.met * work.tokens + 4 * head * work.labels
    adapter = 6 * shape.adapter(lora) * work.tokens
    attention = 6 * shape.layers * shape.query * work.squares
    return float(linear + adapter + attention)


def peak_flops(device: str) -> float | None:
    """FLOP/s of a device by torch's name of it; None where it is not in the table."""
    return next((peak * 1e12 for name, peak in PEAKS if name in device), None)


def mfu(flops: float, seconds: float, peak: float | None) -> float | None:
    """Share of the device's peak."""
    return None if peak is None else flops / (seconds * peak)
