"""Names of GGUF files and Modelfile: which file the others are made of, and which one to serve."""

from __future__ import annotations

from collections.abc import Iterable

from finetune_trainer.config import Quantization

PROFITING = (
    Quantization.Q6_K,
    Quantization.Q5_K_M,
    Quantization.Q4_K_M,
    Quantization.IQ4_XS,
    Quantization.Q3_K_M,
)
"""Types whose blocks llama.cpp fits with an importance matrix, the more so the fewer bits they have
(ggml-quants.c; its Q8_0 ignores one). None of them needs it."""


MODELFILE = "Modelfile"  # names the preferred file

SMALL = 2_000_000_000  # parameters; below, four bits cost much quality
_LARGE_FIRST = (Quantization.Q4_K_M, Quantization.Q5_K_M, Quantization.Q6_K, Quantization.Q8_0)
_SMALL_FIRST = (Quantization.Q8_0, Quantization.Q6_K, Quantization.F16, Quantization.BF16)


def file_name(model: str, quantization: Quantization) -> str:
    """The name that people know from the Hub, e.g. Llama-3.2-1B-Q4_K_M.gguf."""
    return f"{model}-{quantization}.gguf"


def adapter_file_name(model: str) -> str:
    """The name of the adapter's own file, e.g. Llama-3.2-1B-LoRA-F32.gguf."""
    return f"{model}-LoRA-{Quantization.F32}.gguf"


def preferred(kinds: Iterable[Quantization], parameters: float) -> Quantization:
    """The file that most people would serve; small models lose much by four bits."""
    order = _SMALL_FIRST if parameters < SMALL else _LARGE_FIRST
    return min(kinds, key=lambda kind: order.index(kind) if kind in order else len(order))


def source_of(kinds: Iterable[Quantization], own: Quantization) -> Quantization:
    """The type of the file that all others are made of.

    That is one of the files asked for, so that nothing is written but them: of the model's own
    16-bit type if possible, else of the other one, else F32. Where none is, a temporary file of the
    model's own type is needed.
    """
    asked = set(kinds)
    for kind in (own, Quantization.F16, Quantization.BF16, Quantization.F32):
        if kind in asked:
            return kind
    return own
