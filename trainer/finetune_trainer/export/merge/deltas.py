"""What a training left, and what it makes of each weight: a LoRA adapter as PEFT saves it adds to
it, a whole model (method full) takes its place."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.export.merge.checkpoint import (
    CONFIG,
    OUTPUT_LAYERS,
    open_file,
    read_checkpoint,
    shortened,
)
from finetune_trainer.model.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INNER,
    PREFIX,
    is_meant,
    other_kind,
)

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
        """The shape of the weight that it changes."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
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


@dataclass(frozen=True)
class StackedDelta:
    """The adapter of a parameter that holds all experts of a layer, in one tensor of the files."""

    a: torch.Tensor
    """(experts, r, in)"""

    b: torch.Tensor
    """(experts, out, r)"""

    scale: float
    transposed: bool
    """Whether the tensor is (experts, in, out), and not (experts, out, in)."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the tensor that it changes."""
        experts, out, inputs = self.b.shape[0], self.b.shape[1], self.a.shape[2]
        return (experts, inputs, out) if self.transposed else (experts, out, inputs)

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        return self.a, self.b

    def merge(self, base: torch.Tensor, start: int) -> torch.Tensor:
        """The merged experts in float32; `base` are those from `start` on."""
        some = slice(start, start + base.shape[0])
        total = torch.bmm(self.b[some].float(), self.a[some].float())
        if self.transposed:
            total = total.transpose(1, 2)
        return (total * self.scale).add_(base)


@dataclass(frozen=True)
class ExpertFactors:
    """What an adapter's file has of such a parameter."""

    a: torch.Tensor
    """(experts * r, in)"""

    b: torch.Tensor
    """(out, r * experts)"""

    rank: int
    scale: float

    @property
    def experts(self) -> int:
        return self.a.shape[0] // self.rank

    @property
    def _by_expert(self) -> tuple[torch.Tensor, torch.Tensor]:
        a = self.a.reshape(self.experts, self.rank, -1)
        return a, self.b.reshape(-1, self.rank, self.experts).permute(2, 0, 1)

    def of(self, expert: int, rows: slice) -> Delta:
        """That of some rows of an expert's matrix."""
        a, b = self._by_expert
        return Delta(a[expert], b[expert, rows].contiguous(), self.scale)

    def stacked(self, *, transposed: bool) -> StackedDelta:
        a, b = self._by_expert
        return StackedDelta(a, b.contiguous(), self.scale, transposed)


@dataclass(frozen=True)
class Replacement:
    """A weight that was trained as a whole (PEFT's modules_to_save, or method full)."""

    weight: torch.Tensor
    """(out, in), or (out,) of norms and biases"""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that it replaces."""
        return tuple(self.weight.shape)

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        return (self.weight,)

    def merge(self, base: torch.Tensor, start: int) -> torch.Tensor:
        """The rows in place of `base`, which are those from `start` on, in float32."""
        return self.weight[start : start + base.shape[0]].float()


WeightChange = Delta | StackedDelta | Replacement


def is_whole_model(folder: Path) -> bool:
    """Whether a training left a whole model there, and no adapter."""
    return (folder / CONFIG).is_file() and not (folder / ADAPTER_CONFIG).is_file()


def read_whole_model(folder: Path) -> dict[str, Replacement]:
    """The trained weights by their names in the base model's files; raises StageError."""
    return {name: Replacement(item.tensor) for name, item in read_checkpoint(folder).items()}


def _enough_rows(start: int, stop: int, rows: int) -> tuple[int, int]:
    """The rows to compute so that `start` to `stop` get the bits that they have among all."""
    low = start // ALIGNED * ALIGNED
    high = min(-(-stop // ALIGNED) * ALIGNED, rows)
    if high - low < ALIGNED:  # the last few rows
        low = max(0, low - ALIGNED)
    return low, high


_WEIGHT = ".weight"
_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


@dataclass(frozen=True)
class ReadAdapter:
    """What an adapter changes, by module such as model.layers.0.self_attn.q_proj."""

    changes: dict[str, WeightChange]
    experts: dict[str, ExpertFactors]
    """By module as well, with `.base_layer` behind it for each parameter that is wrapped before."""

    target_parameters: tuple[str, ...]


def read_adapter(folder: Path) -> ReadAdapter:
    """Read both files of PEFT; raises StageError(ModelUnsupported) where it can't be merged."""
    config = _read_config(folder / ADAPTER_CONFIG)
    _refuse_other_kinds(config)
    if missing := [key for key in ("r", "lora_alpha") if not config.get(key)]:
        raise _unusable(f"{ADAPTER_CONFIG} has no {shortened(missing)}")
    tensors = _read_tensors(folder / ADAPTER_WEIGHTS)
    modules = {name.removesuffix(_A) for name in tensors if name.endswith(_A)}
    used = {f"{m}{part}" for m in modules for part in (_A, _B, _MAGNITUDE)}
    whole = {name for name in tensors if _is_whole(name, config)}
    experts = _experts_of(modules, tensors, config)
    targets = tuple(config.get("target_parameters") or ())
    if targets and not experts:
        raise _unusable(f"target_parameters names {shortened(targets)}, and no weights are there")
    if unknown := sorted(set(tensors) - used - whole):
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            f"The adapter can't be merged: it holds {shortened(unknown)} besides the LoRA weights "
            "of linear layers. Leave embed_tokens and lm_head out of the target modules; "
            "modules_to_save may name them.",
        )
    if not modules:
        raise _unusable("it holds no LoRA layer")
    _check_whole(config, whole)
    linear = sorted(modules - experts.keys())
    found: dict[str, WeightChange] = {m: _delta(m, tensors, config) for m in linear}
    found |= {n.removesuffix(_WEIGHT): Replacement(tensors[n]) for n in sorted(whole)}
    return ReadAdapter(
        {module.removeprefix(PREFIX): change for module, change in found.items()},
        {module.removeprefix(PREFIX): factors for module, factors in experts.items()},
        targets,
    )


def _experts_of(
    modules: set[str], tensors: dict[str, torch.Tensor], config: dict[str, Any]
) -> dict[str, ExpertFactors]:
    """By the modules that hold them, as PEFT wraps these: once for each parameter."""
    found, rank = {}, int(config["r"])
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    for module in sorted(modules) if config.get("target_parameters") else ():
        a, b = tensors[module + _A], tensors.get(module + _B)
        if a.shape[0] == rank and INNER not in module:
            continue
        if b is None or a.shape[0] % rank or a.shape[0] != b.shape[1]:
            raise _unusable(f"{module} has matrices that don't fit each other or rank {rank}")
        found[module] = ExpertFactors(a, b, rank, config["lora_alpha"] / divisor)
    return found


def _check_whole(config: dict[str, Any], whole: set[str]) -> None:
    """Each module that was trained as a whole must be there."""
    there = [name.removesuffix(_WEIGHT) for name in whole]
    for name in config.get("modules_to_save") or ():
        if not any(is_meant(module, [name]) for module in there):
            raise _unusable(f"modules_to_save names {name}, whose weight is missing")


def _is_whole(name: str, config: dict[str, Any]) -> bool:
    """Whether a tensor is the weight of a module that was trained as a whole."""
    module = name.removesuffix(_WEIGHT)
    named = config.get("modules_to_save") or ()
    tied = bool(named) and bool(config.get("ensure_weight_tying"))
    targets = (*named, *(OUTPUT_LAYERS if tied else ()))  # saved once more under that name
    return module != name and ".lora_" not in name and is_meant(module, targets)


def _delta(module: str, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Delta:
    a, b = tensors[module + _A], tensors.get(module + _B)
    magnitude = tensors.get(module + _MAGNITUDE)
    if b is None:
        raise _unusable(f"{module}{_B} is missing")
    if bool(config.get("use_dora")) is (magnitude is None):
        raise _unusable(f"use_dora is not what its weights for {module} say")
    rank = _for_module(config, "rank_pattern", module, config["r"])
    alpha = _for_module(config, "alpha_pattern", module, config["lora_alpha"])
    if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
        raise _unusable(
            f"{module} has shapes {tuple(a.shape)} and {tuple(b.shape)} instead of rank {rank}"
        )
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return Delta(a, b, alpha / divisor, magnitude)


def _for_module(config: dict[str, Any], pattern: str, module: str, usual: Any) -> Any:
    """A module's own rank or alpha, where the pattern names it."""
    patterns = config.get(pattern) or {}
    if not patterns:
        return usual
    from peft.utils.other import get_pattern_key  # noqa: PLC0415 - slow to import, and seldom needed

    return patterns.get(get_pattern_key(list(patterns), module.removeprefix(PREFIX)), usual)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = dict(json.loads(file.read_bytes()))
    except FileNotFoundError as error:
        raise _unusable(f"{file.name} is missing") from error
    except (ValueError, TypeError) as error:
        raise _unusable(f"{file.name} is no JSON object ({error})") from error
    return config


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return open_file(file)
    except FileNotFoundError as error:
        raise _unusable(f"{file.name} is missing") from error
    except SafetensorError as error:
        raise _unusable(f"{file.name} can't be read ({error})") from error


def _refuse_other_kinds(config: dict[str, Any]) -> None:
    if kind := other_kind(config):
        raise _refused(kind)


def _refused(what: str) -> StageError:
    return StageError(
        Reason.MODEL_UNSUPPORTED,
        f"The adapter can't be merged: its {ADAPTER_CONFIG} sets {what}. Train plain LoRA, rsLoRA "
        "or DoRA without it, or merge this adapter with PEFT itself.",
    )


def _unusable(cause: str) -> StageError:
    return StageError(
        Reason.MODEL_UNSUPPORTED,
        f"The adapter can't be merged: {cause:.400}. Train again, so that it is written anew.",
    )
