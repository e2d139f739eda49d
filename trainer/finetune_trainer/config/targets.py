"""Names of the linear layers that LoRA adapts, where a model fuses or lacks some of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from finetune_trainer.config.training import TargetModule

FUSED = {
    TargetModule.Q: "qkv_proj",
    TargetModule.K: "qkv_proj",
    TargetModule.V: "qkv_proj",
    TargetModule.GATE: "gate_up_proj",
    TargetModule.UP: "gate_up_proj",
}
"""The layer that does the work of several, in models that have it (Phi-3, Phi-4)."""


def modules_for(wanted: Sequence[TargetModule], present: Collection[str]) -> dict[str, str | None]:
    """What adapts each wanted name in a model with linear layers of the names `present`.

    The name itself, the fused layer in its place, or None where the model has neither.
    """
    return {
        name.value: next((n for n in (name.value, FUSED.get(name)) if n in present), None)
        for name in wanted
    }
