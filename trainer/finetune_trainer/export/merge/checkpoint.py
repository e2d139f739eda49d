"""A base model's weights as they lie on disk: names, shards, and the type to store them in."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.model.adapter import is_meant

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: str
    """The file that it is in."""

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class BaseTensor:
    """A tensor of the base model: a view of the mapped file."""

    tensor: torch.Tensor
    shard: str


def read_checkpoint(folder: Path) -> dict[str, BaseTensor]:
    """All tensors by name, in the order of the files; raises StageError(ModelUnsupported)."""
    if (folder / SINGLE).is_file():
        return _tensors(folder, SINGLE)
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    weight_map = _weight_map(folder / INDEX)
    found = {
        name: stored
        for shard in sorted(set(weight_map.values()))
        for name, stored in _tensors(folder, shard).items()
        if weight_map.get(name) == shard
    }
    if missing := sorted(set(weight_map) - set(found)):
        raise _unreadable(INDEX, f"it names {shortened(missing)}, which the files don't hold")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json; raises StageError(ModelUnsupported)."""
    try:
        return dict(json.loads((folder / CONFIG).read_bytes()))
    except FileNotFoundError as error:
        raise _unreadable(CONFIG, "it is missing") from error
    except (ValueError, TypeError) as error:
        raise _unreadable(CONFIG, f"it is no JSON object ({error})") from error


def open_file(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one safetensors file in its order; raises SafetensorError and OSError."""
    handle: Any = safe_open(file, framework="pt")
    return {name: handle.get_tensor(name) for name in handle.offset_keys()}


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def shortened(names: Iterable[str], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    more = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {more} more" if more > 0 else "")


def _tensors(folder: Path, shard: str) -> dict[str, BaseTensor]:
    try:
        opened = open_file(folder / shard)
    except FileNotFoundError as error:
        raise _unreadable(shard, "it is missing") from error
    except SafetensorError as error:
        raise _unreadable(shard, str(error)) from error
    return {name: BaseTensor(tensor, shard) for name, tensor in opened.items()}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return {str(k): str(v) for k, v in json.loads(index.read_bytes())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(index.name, f"it is no index of shards ({error})") from error


def _unreadable(file: str, cause: str) -> StageError:
    return StageError(
        Reason.MODEL_UNSUPPORTED,
        f"The base model's {file} can't be read: {cause.rstrip('.'):.300}. Download or upload the "
        "base model again.",
    )


def _no_weights(folder: Path) -> StageError:
    pickled = sorted(f.name for f in folder.glob("*.bin")) if folder.is_dir() else []
    found = f"only {shortened(pickled)}, which could run code when read" if pickled else "none"
    return StageError(
        Reason.MODEL_UNSUPPORTED,
        f"The base model has no weights in safetensors ({SINGLE} or {INDEX}), {found}. Choose a "
        "revision with safetensors, or save the model again with transformers.",
    )


FLOAT16_SAFE = 60_000.0  # float16 ends at 65,504; quantizers need a margin

_SIXTEEN = (torch.bfloat16, torch.float16)
_WHOLE = (*_SIXTEEN, torch.float32, torch.float64)


def sixteen_bit_type(config: dict[str, Any], tensors: Iterable[torch.Tensor]) -> torch.dtype | None:
    """The type that config.json names, or else that of most weights; None if it has more bits.

    Raises StageError(ModelUnsupported) for weights of fewer bits.
    """
    floating = _floating_bytes(tensors)
    narrow = [str(dtype).removeprefix("torch.") for dtype in floating if dtype not in _WHOLE]
    if narrow or config.get("quantization_config"):
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            f"The base model is quantized ({', '.join(narrow) or 'quantization_config'}), and "
            "merging into it would lose accuracy: name the model in 16 bits that it was made of.",
        )
    named = _named(config)
    if named in _SIXTEEN:
        return named
    usual = max(floating, key=lambda dtype: floating[dtype]) if floating else torch.float16
    return usual if usual in _SIXTEEN else None


def stays_whole(tensors: Iterable[torch.Tensor]) -> Callable[[torch.Tensor], bool]:
    """What says of a tensor whether it stays as it is: float32 in a base of 16 bits."""
    usual = _floating_bytes(tensors).most_common(1)
    sixteen = bool(usual) and usual[0][0] in _SIXTEEN
    return lambda tensor: sixteen and tensor.dtype is torch.float32


def _floating_bytes(tensors: Iterable[torch.Tensor]) -> Counter[torch.dtype]:
    floating: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if tensor.is_floating_point():
            floating[tensor.dtype] += tensor.nbytes
    return floating


def _named(config: dict[str, Any]) -> torch.dtype | None:
    for part in (config, config.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):  # the newer name and the older
            if isinstance(part.get(key), str):
                dtype = getattr(torch, part[key].removeprefix("torch."), None)
                return dtype if isinstance(dtype, torch.dtype) else None
    return None


OUTPUT_LAYERS = ("lm_head", "embed_out")


def weight_names(base: Path, modules: Iterable[str], stored: Collection[str]) -> dict[str, str]:
    """From modules to the names of their weights in the base's files; raises StageError."""
    modules = list(modules)
    _refuse_tied(base, modules)
    names = {module: f"{module}.weight" for module in modules}
    if any(name not in stored for name in names.values()):
        files = _renamed(base, stored)
        names = {module: files.get(name, name) for module, name in names.items()}
    if missing := [name for name in names.values() if name not in stored]:
        raise other_model_error(f"it has no {shortened(missing)}")
    return names


def other_model_error(cause: str) -> StageError:
    return StageError(
        Reason.MODEL_UNSUPPORTED,
        f"The adapter does not belong to this base model: {cause}. Name the model that it was "
        "trained on, or train again.",
    )


def _refuse_tied(base: Path, modules: list[str]) -> None:
    """An output layer that is the input embedding as well can't be changed alone."""
    outputs = [module for module in modules if module.split(".")[-1] in OUTPUT_LAYERS]
    if not outputs:
        return
    # Here and not above: slow to import, and seldom needed.
    from finetune_trainer.model.tokenizer import settings_of  # noqa: PLC0415

    if settings_of(base).get_text_config().tie_word_embeddings:
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            f"The adapter changes {shortened(outputs)}, whose weight is the input embedding's as "
            "well (tie_word_embeddings), so that a merge would change both: leave it out of "
            "spec.training.lora.targetModules.",
        )


class PartOfExperts(NamedTuple):
    """A tensor of the files with rows of one expert's matrix."""

    name: str
    expert: int
    rows: slice


@dataclass(frozen=True)
class ExpertParameter:
    """A parameter that holds all experts of a layer, and where the files have it."""

    stored: str | None
    """As a whole under this name, or in parts."""

    parts: tuple[PartOfExperts, ...] = ()
    transposed: bool = False
    """Whether it is (experts, in, out), and not (experts, out, in)."""


_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def expert_parameters(
    base: Path, targets: Collection[str], stored: Mapping[str, BaseTensor]
) -> dict[str, list[ExpertParameter]]:
    """The parameters that PEFT adapts by their names, by module, in the order of the module."""
    names, modules, patterns = _as_loaded(base, stored)
    found: dict[str, list[ExpertParameter]] = {}
    for path, module in modules.items():
        for own, _ in module.named_parameters(recurse=False):
            if is_meant(f"{path}.{own}", targets):
                files = names.get(f"{path}.{own}", [])
                transposed = bool(getattr(module, "is_transposed", False))
                found.setdefault(path, []).append(_placed(files, stored, patterns, transposed))
    return found


def _placed(
    files: Sequence[tuple[str, str | None]],
    stored: Mapping[str, BaseTensor],
    patterns: Sequence[str],
    transposed: bool,
) -> ExpertParameter:
    if len(files) == 1 and files[0][1] is None:
        return ExpertParameter(files[0][0], transposed=transposed)
    ends: dict[int, int] = {}  # rows of each expert so far
    parts = []
    for name, _ in sorted(files, key=lambda file: patterns.index(str(file[1]))):
        number = _EXPERT.search(name)
        if number is None:
            raise other_model_error(f"its {name} is of no expert")
        expert, rows = int(number[1]), stored[name].tensor.shape[0]
        start = ends.get(expert, 0)
        ends[expert] = start + rows
        parts.append(PartOfExperts(name, expert, slice(start, start + rows)))
    return ExpertParameter(None, tuple(parts))


def _renamed(base: Path, stored: Iterable[str]) -> dict[str, str]:
    """From names of a model's parameters to those in the files, where only the name differs."""
    names, _, _ = _as_loaded(base, stored)
    return {
        renamed: name
        for renamed, files in names.items()
        for name, pattern in files
        if pattern is None
    }


def _as_loaded(
    base: Path, stored: Iterable[str]
) -> tuple[dict[str, list[tuple[str, str | None]]], dict[str, torch.nn.Module], list[str]]:
    """How transformers takes the files.

    Of each parameter the names in the files, with the pattern that put them together; the modules
    without weights; and the patterns in the order of what they stand for in a parameter.
    """
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
        return {}, {}, []  # the caller names what is missing
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    parameters = model.state_dict()
    found: dict[str, list[tuple[str, str | None]]] = {}
    for name in stored:
        renamed, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, parameters
        )
        found.setdefault(renamed, []).append((name, pattern))
    patterns = [pattern for each in converters for pattern in each.source_patterns]
    return found, dict(model.named_modules()), patterns
