"""The merged model in FP8, computed as it is read, in compressed-tensors' format.

Weights of linear layers are float8_e4m3fn with one scale for each output channel, the largest value
of its row over 448; activations are scaled for each token by the server that runs the model, so no
data is needed. Embeddings, output layer, norms, routers and what text doesn't reach stay as they
are. vLLM and transformers load it.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from finetune_trainer.export.merge import UNREACHED, MergedWeights, TensorInfo
from finetune_trainer.export.merge.checkpoint import CONFIG
from finetune_trainer.export.merge.model_folder import READABLE, write_merged
from finetune_trainer.store import OnBytes

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
SCALE = "_scale"  # behind the weight's name
SPAN_ROWS = 1024  # whose largest values are looked for at a time

_LAYER = re.compile(r"\.(layers|h|blocks)\.\d+\.")
_KEPT = ("gate", "router", "shared_expert_gate")
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
            rows, dtype = self._weights.infos[name].shape[0], self.infos[name + SCALE].dtype
            largest = [
                self._weights.rows(name, low, low + SPAN_ROWS).float().abs().amax(1, keepdim=True)
                for low in range(0, rows, SPAN_ROWS)
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


def _is_linear(info: TensorInfo, weights: MergedWeights) -> bool:
    module = info.name.removesuffix(".weight")
    return (
        module != info.name
        and len(info.shape) == 2
        and info.dtype is weights.dtype
        and _LAYER.search(info.name) is not None
        and module.rpartition(".")[2] not in _KEPT
        and UNREACHED.search(info.name) is None
    )
