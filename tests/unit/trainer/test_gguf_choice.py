"""Which GGUF file the others are made of, and which one is served."""

from __future__ import annotations

import pytest

from finetune_trainer.contract import Quantization
from finetune_trainer.contract.output import IMPORTANCE_TYPES
from finetune_trainer.export.gguf.files import (
    adapter_file_name,
    file_name,
    preferred,
)

Q = Quantization


def test_types_below_eight_bits_profit_of_an_importance_matrix() -> None:
    kinds = list(Q)
    assert kinds[kinds.index(Q.Q8_0) + 1 :] == list(IMPORTANCE_TYPES)


@pytest.mark.parametrize(
    ("kinds", "parameters", "expected"),
    [
        (["F16", "Q8_0", "Q4_K_M"], 8e9, "Q4_K_M"),
        (["F16", "Q8_0", "Q4_K_M"], 135e6, "Q8_0"),
        (["Q4_K_M"], 135e6, "Q4_K_M"),
        (["BF16"], 8e9, "BF16"),
    ],
)
def test_the_file_that_most_people_would_serve(
    kinds: list[str], parameters: float, expected: str
) -> None:
    assert preferred([Q(kind) for kind in kinds], parameters) == expected


def test_names() -> None:
    assert file_name("Llama-3.2-1B", Q.Q4_K_M) == "Llama-3.2-1B-Q4_K_M.gguf"
    assert adapter_file_name("Llama-3.2-1B") == "Llama-3.2-1B-LoRA-F32.gguf"
