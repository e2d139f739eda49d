"""Which linear layers of a model get an adapter, by the names of its modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from finetune_trainer.config import TargetModule
from finetune_trainer.config.targets import modules_for
from finetune_trainer.outcome import Reason, StageError

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
