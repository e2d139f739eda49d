"""Models in fewer than 16 bits, as their publishers' folders hold them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
LARGEST = 448.0  # of float8_e4m3fn
SKIPPED = ("embed_tokens", "lm_head", "norm", "router", "mlp.gate.weight")


def quantized(name: str, tensor: torch.Tensor) -> bool:
    return tensor.dim() == 2 and not any(part in name for part in SKIPPED)


def write(base: Path, folder: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> Path:
    """A copy of `base` with other tensors, and how they are to be read in config.json."""
    shutil.copytree(base, folder)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / "config.json").read_bytes())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def spread(scale: torch.Tensor, like: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """A scale for each element."""
    rows = scale.repeat_interleave(block[0], 0)[: like.shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : like.shape[1]]


def block_scale(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The largest value of each block over that of FP8."""
    high, wide = -weight.shape[0] % block[0], -weight.shape[1] % block[1]
    whole = torch.nn.functional.pad(weight.float(), (0, wide, 0, high)).abs()
    found: torch.Tensor = whole.unfold(0, *block[:1] * 2).unfold(1, *block[1:] * 2).amax((2, 3))
    return found / LARGEST


def to_fp8(base: Path, folder: Path, block: tuple[int, int]) -> Path:
    """As DeepSeek and Qwen publish theirs: a scale for each block."""
    tensors = {}
    for name, tensor in load_file(base / WEIGHTS).items():
        tensors[name] = tensor
        if quantized(name, tensor):
            scale = block_scale(tensor, block)
            narrow = tensor.float() / spread(scale, tensor, block)
            tensors[name] = narrow.to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
    settings = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    return write(base, folder, tensors, weight_block_size=list(block), **settings)


def to_mxfp4(base: Path, folder: Path) -> Path:
    """As gpt-oss is published: experts in 4 bits, each 32 with a power of two."""
    torch.manual_seed(3)
    tensors = {}
    for name, tensor in load_file(base / WEIGHTS).items():
        if tensor.dim() != 3:
            tensors[name] = tensor
            continue
        experts, inputs, out = tensor.shape
        parts = tensor.float().transpose(1, 2).reshape(experts, out, inputs // 32, 32)
        power = (parts.abs().amax(-1) / 6).log2().ceil()
        nearest = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
        scaled = parts / power.exp2().unsqueeze(-1)
        digits = (scaled.unsqueeze(-1) - nearest).abs().argmin(-1).to(torch.uint8)
        tensors[f"{name}_blocks"] = digits[..., 0::2] | (digits[..., 1::2] << 4)
        tensors[f"{name}_scales"] = (power + 127).to(torch.uint8)
    return write(base, folder, tensors, quant_method="mxfp4", modules_to_not_convert=["lm_head"])


def to_compressed(base: Path, folder: Path, kind: str, **weights: Any) -> Path:
    """With compressed-tensors' own compressor."""
    arguments = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.get_value_from_registry(kind)
    tensors = {}
    for name, tensor in load_file(base / WEIGHTS).items():
        if not quantized(name, tensor):
            tensors[name] = tensor
            continue
        state = {"weight": tensor, **parameters(tensor, arguments)}
        for part, value in compressor.compress(state, scheme).items():
            tensors[f"{name.removesuffix('weight')}{part}"] = value
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if kind != "pack-quantized":  # servers round activations to 8 bits as well
        number = {name: weights[name] for name in ("num_bits", "type", "symmetric")}
        group["input_activations"] = {**number, "strategy": "token", "dynamic": True}
    return write(
        base,
        folder,
        tensors,
        quant_method="compressed-tensors",
        format=kind,
        quantization_status="compressed",
        config_groups={"group_0": group},
        ignore=["lm_head"],
    )


def parameters(weight: torch.Tensor, arguments: Any) -> dict[str, torch.Tensor]:
    """Scale, and what stands for zero, of a weight."""
    most = LARGEST if arguments.type == "float" else 2 ** (arguments.num_bits - 1) - 1
    size = {"tensor": weight.numel(), "channel": weight.shape[1], "group": arguments.group_size}
    if arguments.strategy == "block":
        scale = block_scale(weight, tuple(arguments.block_structure))
        return {"weight_scale": scale.to(weight.dtype)}  # in which transformers loads it
    parts = weight.float().reshape(-1, size[arguments.strategy])
    shape = (1,) if arguments.strategy == "tensor" else (weight.shape[0], -1)
    if arguments.symmetric:
        return {"weight_scale": (parts.abs().amax(1) / most).reshape(shape).to(weight.dtype)}
    low, high = parts.amin(1), parts.amax(1)
    scale = ((high - low) / (2 * most + 1)).to(weight.dtype)
    zero = (-(most + 1) - low / scale.float()).round().clamp(-(most + 1), most).to(torch.int8)
    return {"weight_scale": scale.reshape(shape), "weight_zero_point": zero.reshape(shape)}
