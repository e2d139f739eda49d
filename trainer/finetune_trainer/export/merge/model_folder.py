"""The merged model as a folder that transformers loads, in 16 bit and in FP8.

The configuration is the base's own file, so that every program that reads the base reads the tuned
model. The tokenizer is the adapter's, which the training used. The weights are written block by
block, in the base's shards.

In FP8, in compressed-tensors' format, weights of linear layers are float8_e4m3fn with one scale for
each output channel, the largest value of its row over 448; activations are scaled for each token by
the server that runs the model, so no data is needed. Embeddings, output layer, norms, routers and
what text doesn't reach stay as they are. vLLM and transformers load it.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedTokenizerBase

from finetune_trainer.export.merge import UNREACHED, MergedWeights
from finetune_trainer.export.merge.checkpoint import (
    CONFIG,
    INDEX,
    SINGLE,
    TensorInfo,
    raw,
    read_config,
)
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.loading import use_available_cpus
from finetune_trainer.model.tokenizer import (
    end_of_turn_ids,
    load_tokenizer,
    save_tokenizer,
    settings_of,
)
from finetune_trainer.store import OnBytes, replacing

GENERATION = "generation_config.json"

_OF_THE_BASE = (
    "preprocessor_config.json",  # what servers need for a model with a vision tower
    "processor_config.json",
)

_DTYPES = ("dtype", "torch_dtype")  # the newer name and the older

BLOCK_BYTES = 8 << 20  # of rows that are written at a time
READABLE = 0o644  # for other users as well, whatever the umask
_ALIGNMENT = 8  # of the values' beginning, as the safetensors library has it

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.bfloat16: "BF16",
}
"""The format's names of the types that a merged model can hold."""

log = logging.getLogger(__name__)


def write_model(
    base: ModelFolder, adapter: Path, target: Path, on_bytes: OnBytes | None = None
) -> None:
    """Merge the adapter into the base model, as a whole folder that transformers loads.

    In place of an adapter there may be a whole model, which is copied in the base model's types and
    shards. Raises StageError: QualityGateFailed when the training changed nothing or left what
    isn't finite, ModelUnsupported when it can't be merged into this base.
    """
    use_available_cpus()
    weights = MergedWeights.open(base.path, adapter)
    weights.check_changes()
    assemble(base, adapter, target, dtype=weights.dtype)
    write_merged(weights, target, on_bytes)
    log.info("Merged what was trained into %d weights", len(weights.targets))


def assemble(
    base: ModelFolder,
    adapter: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Fill the folder `target` with all files of the merged model but weights and their index.

    `dtype` is MergedWeights.dtype; left out, it is worked out again.
    Raises StageError when base or adapter can't be read.
    """
    target.mkdir(parents=True, exist_ok=True)
    dtype = dtype or MergedWeights.open(base.path, adapter).dtype
    config = read_config(base.path)
    tokenizer = load_tokenizer(replace(base, path=adapter))
    _write(target / CONFIG, stored_config(config, dtype, trusted=base.trust_remote_code))
    generation = generation_settings(base)
    _write(target / GENERATION, with_stop_tokens(generation, tokenizer))
    save_tokenizer(tokenizer, base.path, target)
    code = [file.name for file in base.path.glob("*.py")] if base.trust_remote_code else []
    for name in (*_OF_THE_BASE, *code):
        if (base.path / name).is_file() and not (target / name).exists():
            shutil.copyfile(base.path / name, target / name)
    for file in target.iterdir():
        if not file.is_symlink():
            file.chmod(READABLE)  # some are saved for their owner only


def stored_config(config: dict[str, Any], dtype: torch.dtype, *, trusted: bool) -> dict[str, Any]:
    """config.json for weights of another type; without `trusted`, no mention of Python code."""
    name = str(dtype).removeprefix("torch.")
    config = _with_dtype(config, name)
    config["dtype"] = name
    if not trusted:
        config.pop("auto_map", None)
    return config


def _with_dtype(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The configuration with another type wherever one is named, also for a model's parts."""
    changed = {}
    for key, value in config.items():
        part = key.endswith("_config") and isinstance(value, dict)
        given = key in _DTYPES and value is not None
        changed[key] = _with_dtype(value, name) if part else name if given else value
    return changed


def generation_settings(base: ModelFolder) -> dict[str, Any]:
    """The base's generation settings; without a file of their own, those of its config.json."""
    if (base.path / GENERATION).is_file():
        settings = dict(json.loads((base.path / GENERATION).read_bytes()))
    else:
        settings = GenerationConfig.from_model_config(settings_of(base.path)).to_diff_dict()
    # It marks settings that nobody chose, and that a program may replace.
    settings.pop("_from_model_config", None)
    return settings


def with_stop_tokens(
    settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Generation settings with every token that the chat template ends turns with."""
    known = settings.get("eos_token_id")
    ends = [known] if isinstance(known, int) else list(known or [])
    for token in (tokenizer.eos_token_id, *sorted(end_of_turn_ids(tokenizer))):
        if token not in ends:
            ends.append(token)
    return {**settings, "eos_token_id": ends[0] if len(ends) == 1 else ends}


def _write(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


class Weights(Protocol):
    """Tensors by name, read by rows."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor: ...


def write_merged(weights: Weights, target: Path, on_bytes: OnBytes | None = None) -> None:
    """Write shards, and their index where there are several, to the folder `target`.

    `on_bytes` hears how many bytes were written since it was last called. A shard appears under
    its name when it is complete, and the index when all shards are.
    """
    shards: dict[str, list[TensorInfo]] = {}
    for info in weights.infos.values():
        shards.setdefault(info.shard, []).append(info)
    for shard, infos in shards.items():
        with replacing(target / shard) as partial, partial.open("wb") as file:
            partial.chmod(READABLE)
            _write_shard(weights, infos, file, on_bytes or (lambda _: None))
    if set(shards) != {SINGLE}:
        with replacing(target / INDEX) as partial:
            partial.write_text(json.dumps(_index(weights), indent=2, sort_keys=True) + "\n")
            partial.chmod(READABLE)


def _write_shard(
    weights: Weights, infos: list[TensorInfo], file: BinaryIO, on_bytes: OnBytes
) -> None:
    # The widest types come first. So every tensor begins at a multiple of its type's size.
    infos = sorted(infos, key=lambda info: -info.dtype.itemsize)
    head = _header(infos)
    file.write(head)
    on_bytes(len(head))
    for info in infos:
        for start, stop in _blocks(info):
            # No name for the rows: they would stay while the next ones are computed.
            on_bytes(file.write(raw(weights.rows(info.name, start, stop))))


def _header(infos: list[TensorInfo]) -> bytes:
    """The length of the JSON in eight bytes, then the JSON, padded with spaces."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for info in infos:
        begin, end = end, end + info.nbytes
        entries[info.name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _blocks(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """Rows of about BLOCK_BYTES."""
    rows = info.shape[0] if info.shape else 1
    size = max(1, BLOCK_BYTES * rows // max(1, info.nbytes))
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


def _index(weights: Weights) -> dict[str, Any]:
    """The index as transformers writes it."""
    infos = weights.infos.values()
    return {
        "metadata": {
            "total_parameters": sum(torch.Size(info.shape).numel() for info in infos),
            "total_size": sum(info.nbytes for info in infos),
        },
        "weight_map": {info.name: info.shard for info in infos},
    }


LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
SCALE = "_scale"  # behind the weight's name

_LAYER = re.compile(r"\.(layers|h|blocks)\.\d+\.")
_SIXTEEN_BITS = ("gate", "router", "shared_expert_gate")
"""Routers of a mixture of experts: a wrong expert costs more than their few weights save."""


class Fp8Weights:
    """As MergedWeights, in FP8. A model whose experts are stacked is refused by `prepare`."""

    def __init__(self, weights: MergedWeights) -> None:
        self._weights = weights
        self.quantized = [each.name for each in weights.infos.values() if _is_linear(each, weights)]
        self._scales: dict[str, torch.Tensor] = {}
        # float16 has no digits left for scales of small weights.
        scale = torch.bfloat16 if weights.dtype is torch.bfloat16 else torch.float32
        self.infos = dict(weights.infos)
        for name in self.quantized:
            info = weights.infos[name]
            self.infos[name] = TensorInfo(name, torch.float8_e4m3fn, info.shape, info.shard)
            beside = TensorInfo(name + SCALE, scale, (info.shape[0], 1), info.shard)
            self.infos[name + SCALE] = beside

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of a tensor in the type that `infos` names."""
        if name not in self._weights.infos:
            return self._scale(name.removesuffix(SCALE))[start:stop]
        values = self._weights.rows(name, start, stop)
        if self.infos[name].dtype is not torch.float8_e4m3fn:
            return values
        exact = values.float() / self._scale(name)[start:stop].float()
        return exact.clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)

    def _scale(self, name: str) -> torch.Tensor:
        """(out, 1) of a weight. The scales of all are some megabytes, so they are kept."""
        if name not in self._scales:
            info, dtype = self._weights.infos[name], self.infos[name + SCALE].dtype
            largest = [
                self._weights.rows(name, low, high).float().abs().amax(1, keepdim=True)
                for low, high in _blocks(info)
            ]
            scale = torch.cat(largest) / LARGEST
            self._scales[name] = scale.clamp_(min=torch.finfo(dtype).tiny).to(dtype)
        return self._scales[name]

    def settings(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        names = (name.removesuffix(".weight") for name in self._weights.infos)
        linear = {name.removesuffix(".weight") for name in self.quantized}
        kept = [n for n in names if n not in linear and f"{n}.weight" in self._weights.infos]
        kept = [n for n in kept if len(self._weights.infos[f"{n}.weight"].shape) == 2]
        number = {"num_bits": 8, "type": "float", "symmetric": True}
        group = {
            "targets": ["Linear"],
            "weights": {**number, "strategy": "channel", "dynamic": False},
            "input_activations": {**number, "strategy": "token", "dynamic": True},
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": sorted({"lm_head", *(n for n in kept if "embed" not in n)}),
        }


def write_fp8(
    weights: MergedWeights, merged: Path, target: Path, on_bytes: OnBytes | None = None
) -> None:
    """Fill the folder `target`; `merged` has configuration and tokenizer of the merged model."""
    target.mkdir(parents=True, exist_ok=True)
    for file in merged.iterdir():
        if "safetensors" not in file.name:
            shutil.copyfile(file, target / file.name)
            (target / file.name).chmod(READABLE)
    narrow = Fp8Weights(weights)
    config = json.loads((target / CONFIG).read_bytes())
    config["quantization_config"] = narrow.settings()
    (target / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_merged(narrow, target, on_bytes)


ROUNDING = 2.0**-4 + 2.0**-8
"""Of a value: half a step of e4m3, which has three bits behind the point, and a scale's 8 bits."""

SMALLEST = 2.0**-9
"""e4m3's smallest step, of a scale."""


def fp8_problem(weights: MergedWeights, folder: Path) -> str | None:
    """What a folder in FP8 has otherwise than the merged model rounded; None if nothing.

    Each value is read back, times its channel's scale, and has to be within FP8's rounding of the
    merged one; tensors that stay in 16 bits have to be equal. So a wrong scale of one channel is
    found, a tensor in another's place, and what the disk lost.
    """
    names = dict(weights.infos)
    for name, found, scale in _read_back(folder):
        if names.pop(name, None) is None:
            return f"{name} is no tensor of the model, or is there twice"
        if (row := _other_row(weights, name, found, scale)) is not None:
            return f"row {row} of {name} isn't the merged model's in FP8"
    return f"{min(names)} is missing" if names else None


def _read_back(folder: Path) -> Iterator[tuple[str, Any, torch.Tensor | None]]:
    """Each tensor of a folder in FP8 by its name, to be sliced, with its scale if it has one."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names = set(tensors.keys())
            for name in sorted(name for name in names if not name.endswith(SCALE)):
                found = tensors.get_slice(name)
                if not found.get_shape():  # which can't be sliced
                    found = tensors.get_tensor(name).reshape(1)
                scales = name + SCALE
                yield name, found, tensors.get_tensor(scales) if scales in names else None


def _other_row(
    weights: MergedWeights, name: str, found: Any, scale: torch.Tensor | None
) -> int | None:
    """The first row whose values, times its scale, are not the merged ones rounded."""
    for low, high in _blocks(weights.infos[name]):
        exact, read = weights.rows(name, low, high), found[low:high]
        if scale is None:
            same = read == exact
        else:
            factor = scale[low:high].float()
            off = (read.float() * factor - exact.float()).abs()
            same = off <= exact.float().abs() * ROUNDING + factor * SMALLEST
        others = (~same).reshape(len(same), -1).any(1).nonzero()
        if len(others):
            return low + int(others[0])
    return None


def _is_linear(info: TensorInfo, weights: MergedWeights) -> bool:
    module = info.name.removesuffix(".weight")
    return (
        module != info.name
        and len(info.shape) == 2
        and info.dtype is weights.dtype
        and _LAYER.search(info.name) is not None
        and module.rpartition(".")[2] not in _SIXTEEN_BITS
        and UNREACHED.search(info.name) is None
    )
