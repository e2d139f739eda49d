"""However large a tensor is, a merge holds some blocks of its rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

MIB = 1 << 20
ROWS, COLUMNS, RANK = 8192, 8192, 16  # 128 MiB in bfloat16, 256 MiB as a delta in float32
VOCABULARY = 65536  # rows of 128 MiB that the adapter doesn't change


def test_memory_is_some_blocks_of_rows(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_wide_model(base)
    save_wide_adapter(adapter)
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}.merge_memory", base, adapter, tmp_path / "merged"],
        capture_output=True,
        text=True,
        check=True,
    )
    took = json.loads(done.stdout)
    size = (tmp_path / "merged" / "model.safetensors").stat().st_size
    assert size == (base / "model.safetensors").stat().st_size > 256 * MIB
    assert took["most"] - took["before"] < 96 * MIB  # less than either tensor
    assert took["most"] < 600 * MIB


def save_wide_model(folder: Path) -> None:
    """Two large tensors of random values."""
    folder.mkdir()
    torch.manual_seed(0)
    values = torch.randn(ROWS // 8, COLUMNS).bfloat16()
    tensors = {
        "model.embed_tokens.weight": values.view(-1, 1024).repeat(8, 1),
        "model.layers.0.mlp.up_proj.weight": values.repeat(8, 1),
    }
    assert tensors["model.embed_tokens.weight"].shape[0] == VOCABULARY
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))


def save_wide_adapter(folder: Path) -> None:
    """LoRA of the second of them."""
    folder.mkdir()
    module = "base_model.model.model.layers.0.mlp.up_proj"
    tensors = {
        f"{module}.lora_A.weight": torch.randn(RANK, COLUMNS),
        f"{module}.lora_B.weight": torch.randn(ROWS, RANK),
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "init_lora_weights": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
