"""Which engine trains: transformers everywhere, or Unsloth where it can run.

The decision, which the stage takes without importing either. How Unsloth loads a model stands in
unsloth_engine; docs/engines.md says why there is one environment for both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from finetune_trainer.config import RunConfig
from finetune_trainer.outcome import Notice, NoticeCode
from finetune_trainer.train.devices import Gpu

Engine = Literal["transformers", "unsloth"]

# Model types with kernels of Unsloth's own (unsloth/models/loader.py, 2026.10); all others go
# through a general path that compiles transformers' code.
MODEL_TYPES = frozenset({"llama", "mistral", "gemma", "gemma2", "qwen2", "qwen3"})
LEAST_CAPABILITY = (7, 0)  # Volta: the oldest that its Triton kernels run on


@dataclass(frozen=True)
class Choice:
    """The engine, and why it is not Unsloth where that was wished for."""

    engine: Engine
    obstacle: str | None = None

    def notice(self, wanted: str, gpus: int) -> Notice | None:
        """What people should know: nothing where `auto` trains on a CPU, as it always does."""
        if self.obstacle is None or (wanted == "auto" and gpus == 0):
            return None
        return fallback_notice(f"Unsloth can't train here: {self.obstacle}")


def fallback_notice(evidence: str) -> Notice:
    """That the transformers engine trains, where Unsloth was wished for."""
    return Notice(
        code=NoticeCode.ENGINE_FALLBACK,
        evidence=f"{evidence:.300}",
        remedy="The transformers engine trains instead, with the same result. "
        "Set training.engine to transformers to silence this.",
    )


def choose(
    config: RunConfig,
    *,
    gpus: tuple[Gpu, ...],
    processes: int,
    model_type: str | None,
    missing: str | None,
) -> Choice:
    """Unsloth where it can run; `missing` is what its installation lacks."""
    wanted = config.training.engine
    if wanted == "transformers":
        return Choice("transformers")
    obstacle = _obstacle(config, gpus, processes, model_type, missing)
    return Choice("unsloth") if obstacle is None else Choice("transformers", obstacle)


def _obstacle(
    config: RunConfig,
    gpus: tuple[Gpu, ...],
    processes: int,
    model_type: str | None,
    missing: str | None,
) -> str | None:
    if not gpus:
        return "there is no NVIDIA GPU"
    major, minor = gpus[0].capability
    known = ", ".join(sorted(MODEL_TYPES))
    obstacles = [
        (missing is not None, missing or ""),
        (processes > 1, f"it trains on one GPU, and here are {processes}"),
        (
            gpus[0].capability < LEAST_CAPABILITY,
            f"{gpus[0].name} has compute capability {major}.{minor}, and it needs 7.0",
        ),
        (config.model.trust_remote_code, "the model brings its own code (trustRemoteCode)"),
        (
            model_type not in MODEL_TYPES,
            f"the model type {model_type} has no fast path in it ({known} have)",
        ),
    ]
    return next((text for applies, text in obstacles if applies), None)


def missing_for_unsloth() -> str | None:
    """What keeps Unsloth from being imported: that it, or a version it asks for, isn't there."""
    try:
        wanted = [Requirement(text) for text in requires("unsloth") or ()]
        own = version("unsloth")
    except PackageNotFoundError:
        return "this image has no Unsloth (build it with the extra unsloth)"
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            return f"Unsloth {own} needs {requirement.name}, which isn't installed"
        # The public part: 2.13.0+cpu is 2.13.0.
        if not requirement.specifier.contains(found.partition("+")[0], prereleases=True):
            return f"Unsloth {own} needs {requirement}, and {found} is installed"
    return None


def model_type_of(folder: Path) -> str | None:
    """The model_type of config.json."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name = found.get("model_type") if isinstance(found, dict) else None
    return name if isinstance(name, str) else None
