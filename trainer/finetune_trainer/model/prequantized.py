"""Base models that are published in fewer than 16 bits, brought to 16 bits as they are read.

Everything behind this module sees an ordinary 16-bit model: the training, the merge, the quality
gate's reference, llama.cpp's converter. Values are computed block by block in float32 and rounded
once, which gives the bits of transformers' own dequantizing (FP8, MXFP4) and of
compressed-tensors'. These are read:

fp8                 float8_e4m3fn with a scale for each block or tensor (DeepSeek, Qwen 3 FP8)
mxfp4               gpt-oss's experts: two values of 4 bits a byte, a power of two for each 32
compressed-tensors  float-quantized and int-quantized (a scale for each tensor, channel or block)
                    and pack-quantized (integers of 4 or 8 bits, by channel or group)

Any other format is refused by name. This module plans; a process of its own computes the values
(widening), since the stage that trains has no torch.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune_trainer.contract import Base, Export, PreparedRunConfig, Reason, StageError
from finetune_trainer.model import ModelFolder, base_model
from finetune_trainer.model.converter import (
    INDEX,
    SINGLE,
    Header,
    Headers,
    TensorHeader,
    local_header,
    refusal_in,
    weight_files,
)
from finetune_trainer.runtime import child
from finetune_trainer.runtime.reporter import Reporter

WORKER = "finetune_trainer.model.widening"
CONFIG = "config.json"
SETTINGS, FORMER_SETTINGS = "quantization_config", "compression_config"

NARROW_TYPES = {
    *("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
}
"""The safetensors format's names of floating types below 16 bits."""

_SIXTEEN = {"bfloat16": "BF16", "float16": "F16"}
_BYTES = {"BF16": 2, "F16": 2}
_SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_IGNORED = (
    *("input_scale", "output_scale", "activation_scale", "input_zero_point", "output_zero_point"),
    *("k_scale", "v_scale", "q_scale"),
)
"""Ends of tensors' names that say how a server rounds activations and its cache."""


@dataclass(frozen=True)
class NarrowTensor:
    """Where the values of a tensor are that has 16 bits from now on."""

    values: str
    """The tensor with the narrow values."""

    scale: str
    bits: int = 0
    """Of integers that are packed into 32-bit words; 0 for one value an element."""

    zero: str | None = None
    """The tensor with what stands for zero; None for 0."""

    group: str | None = None
    """The tensor with each column's group; None where columns are in order."""

    block: tuple[int, int] | None = None
    """Rows and columns that share a scale, where they don't divide the shape."""

    mx: bool = False
    """Whether they are gpt-oss's experts."""


@dataclass(frozen=True)
class Widened:
    """A model in 16 bits, as it is planned."""

    config: dict[str, Any]
    """config.json, without a word of the quantization."""

    headers: Headers
    sources: Mapping[str, NarrowTensor]
    """Where values come from, by tensor; all others stay as they are."""

    @property
    def index(self) -> dict[str, Any]:
        """model.safetensors.index.json"""
        named = {name: file for file, header in self.headers.items() for name in header}
        return {"metadata": {"total_size": self.nbytes}, "weight_map": named}

    @property
    def nbytes(self) -> int:
        return sum(sum(_size(tensor) for tensor in each.values()) for each in self.headers.values())


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of its quantization; empty where there is none."""
    text = config.get("text_config") or {}
    return dict(config.get(SETTINGS) or text.get(SETTINGS) or config.get(FORMER_SETTINGS) or {})


def widen(config: Mapping[str, Any], headers: Headers) -> Widened | None:
    """Plan the 16-bit model of one in fewer bits; None where it has 16 bits or more.

    Raises StageError(ModelUnsupported) for a format that isn't read.
    """
    settings = settings_of(config)
    tensors = {name: tensor for header in headers.values() for name, tensor in header.items()}
    narrow = sorted({tensor.dtype for tensor in tensors.values()} & NARROW_TYPES)
    if not settings and not narrow:
        return None
    method = _method(settings) or ", ".join(narrow)
    find = _METHODS.get(method)
    if find is None:
        raise unreadable(method or SETTINGS)
    sources = find(settings, tensors, method)
    wide = _SIXTEEN.get(_named_type(config), "BF16")
    used = {n for s in sources.values() for n in (s.values, s.scale, s.zero, s.group) if n}
    used |= {name for name in tensors if name.rpartition(".")[2].endswith(_IGNORED)}
    used |= {name for name in tensors if name.endswith(".weight_shape")}
    found = {
        file: _header(header, sources, tensors, used, wide) for file, header in headers.items()
    }
    rest = [tensor for header in found.values() for tensor in header.values()]
    if left := sorted({tensor.dtype for tensor in rest} & NARROW_TYPES):
        raise unreadable(f"{method}, with {', '.join(left)} that no scale belongs to")
    return Widened(_config(config, wide), found, sources)


def unreadable(format_: str) -> StageError:
    """A base model can't be read in this format."""
    return StageError(
        Reason.MODEL_UNSUPPORTED,
        f"The base model is quantized ({format_:.200}), in a format that isn't read here (fp8, "
        "mxfp4 and compressed-tensors are): name in spec.model.source the model in 16 bits that it "
        "was made of.",
    )


def fetch_whole(config: PreparedRunConfig, target: Path, reporter: Reporter) -> ModelFolder:
    """Bring the whole model to disk in 16 bits or more, in just the revision that `prepare` saw.

    A quantized one is there twice then: as it is, and in 16 bits in the folder `target`-16-bit.
    Where nothing is merged, a model in a format that isn't read stays as it is.
    """
    model = base_model.fetch_resolved(config, target, reporter)
    if not is_quantized(model.path):
        return model
    try:
        headers = {file: local_header(model.path / file)[1] for file in weight_files(model.path)}
        widen(json.loads((model.path / CONFIG).read_bytes()), headers)
    except StageError:
        if needs_whole(config.export):
            raise
        return model
    shown = child.as_transfer(reporter, f"Bringing {config.model.source} to 16 bits")
    return write_whole(model, target.with_name(f"{target.name}-16-bit"), shown)


def write_whole(
    model: ModelFolder, target: Path, on_progress: child.OnProgress | None = None
) -> ModelFolder:
    """Write a quantized model in 16 bits, in a process of its own; returns the folder `target`."""
    request = WideningRequest(source=model.path, target=target)
    done = child.run(
        [sys.executable, "-m", WORKER], request.model_dump_json(), on_progress=on_progress
    )
    if done.status == 0:
        return replace(model, path=target)
    if "No space left on device" in done.errors:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if refused := refusal_in(done.output):
        raise refused
    raise StageError(
        Reason.INTERNAL_ERROR,
        f"The base model could not be brought to 16 bits: {done.last_line():.300}. Name in "
        "spec.model.source the model in 16 bits that it was made of.",
    )


def is_quantized(folder: Path) -> bool:
    """Whether the config.json in a folder says so."""
    return bool(settings_of(json.loads((folder / CONFIG).read_bytes())))


def is_widened(folder: Path) -> bool:
    """Whether `fetch_whole` writes it in 16 bits beside itself, by the config.json in a folder.

    A model in a format that isn't read stays as it is, or is refused where it is merged.
    """
    return _method(settings_of(json.loads((folder / CONFIG).read_bytes()))) in _METHODS


def _method(settings: Mapping[str, Any]) -> str:
    return str(settings.get("quant_method") or settings.get("format") or "")


def needs_whole(export: Export) -> bool:
    """Whether an export merges, for which a base model has to be in 16 bits."""
    return bool(export.merged or export.merged_fp8 or export.gguf)


def outline(model: ModelFolder, headers: Headers, target: Path) -> tuple[ModelFolder, Headers]:
    """The small files and the headers that a model will have in 16 bits, in the folder `target`.

    Those that it has, where it has 16 bits. Raises StageError(ModelUnsupported).
    """
    wide = widen(json.loads((model.path / CONFIG).read_bytes()), headers)
    if wide is None:
        return model, headers
    write_small(model.path, wide, target)
    return replace(model, path=target), wide.headers


def write_small(source: Path, wide: Widened, target: Path) -> None:
    """Fill the folder `target` with all files but the weights."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name not in (CONFIG, INDEX):
            (target / file.name).symlink_to(file.resolve())
    (target / CONFIG).write_text(json.dumps(wide.config, indent=2) + "\n")
    if [*wide.headers] != [SINGLE]:
        (target / INDEX).write_text(json.dumps(wide.index, indent=2, sort_keys=True) + "\n")


class WideningRequest(Base):
    """What the process does."""

    source: Path
    target: Path


def _config(config: Mapping[str, Any], wide: str) -> dict[str, Any]:
    """config.json in 16 bits."""
    name = next(name for name, short in _SIXTEEN.items() if short == wide)
    made = {k: v for k, v in config.items() if k not in (SETTINGS, FORMER_SETTINGS)}
    if isinstance(text := made.get("text_config"), dict):
        made["text_config"] = {key: value for key, value in text.items() if key != SETTINGS}
    key = "torch_dtype" if "torch_dtype" in config else "dtype"  # the older name and the newer
    return {**made, key: name}


def _named_type(config: Mapping[str, Any]) -> str:
    for part in (config, config.get("text_config") or {}):
        if named := part.get("dtype") or part.get("torch_dtype"):
            return str(named).removeprefix("torch.")
    return ""


def _header(
    header: Header,
    sources: Mapping[str, NarrowTensor],
    tensors: Mapping[str, TensorHeader],
    used: set[str],
    wide: str,
) -> Header:
    """A file's header in 16 bits: a tensor stands where its narrow values stood."""
    by_values = {source.values: name for name, source in sources.items()}
    made: Header = {}
    end = 0
    for name, tensor in header.items():
        if name in by_values:
            shape = _shape(sources[by_values[name]], tensors)
            size = math.prod(shape) * _BYTES[wide]
            made[by_values[name]] = TensorHeader(wide, shape, (end, end + size))
        elif name not in used:
            size = _size(tensor)
            made[name] = replace(tensor, data_offsets=(end, end + size))
        else:
            continue
        end += size
    return made


def _shape(source: NarrowTensor, tensors: Mapping[str, TensorHeader]) -> list[int]:
    """Of a tensor in 16 bits."""
    shape = tensors[source.values].shape
    if source.mx:
        experts, out, blocks, packed = shape
        return [experts, blocks * packed * 2, out]
    if not source.bits:
        return list(shape)
    return [*shape[:-1], shape[-1] * 32 // source.bits]


def _size(tensor: TensorHeader) -> int:
    return tensor.data_offsets[1] - tensor.data_offsets[0]


# --- Formats ------------------------------------------------------------------------------------


def _fp8(
    settings: Mapping[str, Any], tensors: Mapping[str, TensorHeader], method: str
) -> dict[str, NarrowTensor]:
    """`X` beside `X_scale_inv`, by which it is multiplied all the same."""
    shared = _pair(settings.get("weight_block_size"))
    return _scaled(tensors, "_scale_inv", shared, method, ("F8_E4M3",))


def _pair(block: Sequence[int] | str | None) -> tuple[int, int] | None:
    """Rows and columns of a block; older files have them as "128x128"."""
    sides = block.split("x") if isinstance(block, str) else block
    return (int(sides[0]), int(sides[1])) if sides else None


def _mxfp4(
    settings: Mapping[str, Any], tensors: Mapping[str, TensorHeader], method: str
) -> dict[str, NarrowTensor]:
    """`X_blocks` (experts, out, blocks, 16 bytes) and `X_scales` (experts, out, blocks)."""
    del settings
    found = {}
    for name, tensor in tensors.items():
        if not name.endswith("_blocks"):
            continue
        whole = name.removesuffix("_blocks")
        scale = tensors.get(f"{whole}_scales")
        fits = tensor.dtype == "U8" and len(tensor.shape) == 4
        if scale is None or not fits or scale.shape != tensor.shape[:-1]:
            raise unreadable(f"{method}, but {name} is not laid out as gpt-oss's")
        found[whole] = NarrowTensor(values=name, scale=f"{whole}_scales", mx=True)
    return found


def _compressed(
    settings: Mapping[str, Any], tensors: Mapping[str, TensorHeader], method: str
) -> dict[str, NarrowTensor]:
    """compressed-tensors: one group of layers, all in one format."""
    groups = settings.get("config_groups") or {}
    weights = [dict(group.get("weights") or {}) for group in groups.values()]
    formats = {group.get("format") or settings.get("format") for group in groups.values()}
    named = f"{method}, {' and '.join(sorted(map(str, formats))) or 'without groups'}"
    sparse = (settings.get("sparsity_config") or {}).get("format", "dense")
    if not weights or len(formats) != 1 or any(w != weights[0] for w in weights):
        raise unreadable(f"{named} in several groups")
    if sparse != "dense" or settings.get("transform_config"):
        raise unreadable(f"{named}, sparse or transformed")
    (kind,), (first, *_) = formats, weights
    if kind in ("float-quantized", "int-quantized", "naive-quantized"):
        shared = _pair(first.get("block_structure"))
        if not shared and (first.get("group_size") or 0) > 0:
            shared = (1, int(first["group_size"]))
        return _scaled(tensors, "_scale", shared, named, ("F8_E4M3", "I8"))
    if kind != "pack-quantized" or first.get("num_bits") not in (4, 8):
        raise unreadable(named)
    return _packed(tensors, int(first["num_bits"]), named)


def _packed(tensors: Mapping[str, TensorHeader], bits: int, named: str) -> dict[str, NarrowTensor]:
    found = {}
    for name, tensor in tensors.items():
        if not name.endswith(".weight_packed"):
            continue
        module = name.removesuffix("_packed")
        zero, group = f"{module}_zero_point", f"{module}_g_idx"
        scale = tensors.get(f"{module}_scale")
        if scale is None or tensor.dtype != "I32" or len(tensor.shape) != 2:
            raise unreadable(f"{named}, but {name} has another layout")
        found[module] = NarrowTensor(
            values=name,
            scale=f"{module}_scale",
            bits=bits,
            zero=zero if zero in tensors else None,
            group=group if group in tensors else None,
        )
    return found


def _scaled(
    tensors: Mapping[str, TensorHeader],
    suffix: str,
    block: tuple[int, int] | None,
    method: str,
    types: tuple[str, ...],
) -> dict[str, NarrowTensor]:
    """Values beside a scale of the same name and `suffix`."""
    found = {}
    for name, tensor in tensors.items():
        scale = tensors.get(name + suffix)
        if scale is None:
            continue
        if tensor.dtype not in types or scale.dtype not in _SCALES or len(tensor.shape) < 2:
            raise unreadable(f"{method}, with {name} in {tensor.dtype}")
        zero = f"{name}_zero_point"
        found[name] = NarrowTensor(
            name, name + suffix, zero=zero if zero in tensors else None, block=block
        )
    return found


_METHODS = {"fp8": _fp8, "mxfp4": _mxfp4, "compressed-tensors": _compressed}
