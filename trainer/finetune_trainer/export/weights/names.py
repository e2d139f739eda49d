"""Which weight of the base's files a module's adapter changes.

Nearly always it is the module's name with ".weight". Of some models transformers renames the
weights as it loads them (Gemma 3 with its vision tower, files without the "model." in front); it is
asked for these names then, on a model without values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch

from finetune_trainer.export.weights.checkpoint import some
from finetune_trainer.outcome import Reason, StageError

_OUTPUT_LAYERS = ("lm_head", "embed_out")


def weight_names(base: Path, modules: Iterable[str], stored: Collection[str]) -> dict[str, str]:
    """Modules to the names of their weights in the base's files; raises StageError."""
    modules = list(modules)
    _refuse_tied(base, modules)
    names = {module: f"{module}.weight" for module in modules}
    if any(name not in stored for name in names.values()):
        files = _renamed(base, stored)
        names = {module: files.get(name, name) for module, name in names.items()}
    if missing := [name for name in names.values() if name not in stored]:
        raise other_model(f"it has no {some(missing)}")
    return names


def other_model(cause: str) -> StageError:
    """The adapter was trained on another model."""
    return StageError(
        Reason.MODEL_UNSUPPORTED,
        f"The adapter does not belong to this base model: {cause}. Name the model that it was "
        "trained on, or train again.",
    )


def _refuse_tied(base: Path, modules: list[str]) -> None:
    """An output layer that is the input embedding as well can't be changed alone."""
    outputs = [module for module in modules if module.split(".")[-1] in _OUTPUT_LAYERS]
    if not outputs:
        return
    from transformers import AutoConfig  # noqa: PLC0415 - slow to import, and seldom needed

    config = AutoConfig.from_pretrained(base).get_text_config()
    if config.tie_word_embeddings:
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            f"The adapter changes {some(outputs)}, whose weight is the input embedding's as well "
            "(tie_word_embeddings), so that a merge would change both: leave it out of "
            "spec.training.lora.targetModules.",
        )


def _renamed(base: Path, stored: Iterable[str]) -> dict[str, str]:
    """Names of a model's parameters to those of the files, where no more than the name differs."""
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415 - see above
    from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415
    from transformers.core_model_loading import (  # noqa: PLC0415
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    try:
        with torch.device("meta"):
            auto: Any = AutoModelForCausalLM
            model = auto.from_config(AutoConfig.from_pretrained(base))
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError):
        return {}  # the caller names what is missing
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    parameters = model.state_dict()
    found = {}
    for name in stored:
        renamed, converted = rename_source_key(
            name, renamings, converters, model.base_model_prefix, parameters
        )
        if converted is None:
            found[renamed] = name
    return found
