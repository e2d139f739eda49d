"""Which linear layers of a model get an adapter, by the names of its modules."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from finetune_trainer.contract import Reason, StageError, TargetModule

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


NO_TEXT = r".*(vision|visual|audio|multi_modal)\w*\..*"
"""Parts of a multimodal model that no text passes through: an adapter there learns nothing."""


def of_text(names: Iterable[str]) -> list[str]:
    """The modules that text passes through."""
    return [name for name in names if not re.fullmatch(NO_TEXT, name)]


def resolve_targets(wanted: Sequence[TargetModule], names: Iterable[str]) -> dict[str, str]:
    """The layer that stands for each wanted one, which is another where the model fuses several.

    `names` are those of the linear layers, e.g. model.layers.0.self_attn.q_proj. Raises
    StageError(InvalidConfig) when the model has no such layer.
    """
    present = {name.rpartition(".")[2] for name in of_text(names)}
    found = modules_for(wanted, present)
    if missing := [name for name, own in found.items() if own is None]:
        raise _missing(missing, present)
    return {name: own for name, own in found.items() if own}


def _missing(missing: list[str], present: set[str]) -> StageError:
    possible = [name for name, own in modules_for(tuple(TargetModule), present).items() if own]
    remedy = (
        f"set it to some of {', '.join(possible)}"
        if possible
        else "choose another base model, since none of the names that can be given is in this one"
    )
    has = ", ".join(sorted(present)) or "none"
    return StageError(
        Reason.INVALID_CONFIG,
        f"spec.training.lora.targetModules: the base model has no {', '.join(missing)}. Its "
        f"linear layers are {has:.300}: {remedy}.",
    )
