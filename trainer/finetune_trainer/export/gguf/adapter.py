"""The adapter alone as GGUF, which llama.cpp and Ollama apply to a GGUF file of the base model."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from finetune_trainer.base_model import converter
from finetune_trainer.outcome import Reason, StageError
from finetune_trainer.storage.local import replacing

SCRIPT = "convert_lora_to_gguf.py"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_UNKNOWN = ("use_dora", "modules_to_save", "alpha_pattern", "rank_pattern", "lora_bias")
"""Fields of PEFT's LoraConfig that llama.cpp's adapters have no place for."""


def write_adapter(
    folder: Path, adapter: Path, target: Path, *, trust_remote_code: bool = False
) -> None:
    """Write a LoRA adapter of PEFT as GGUF in F32 to the file `target`.

    `folder` has the base model's configuration; its weights are not needed. Raises
    StageError(ModelUnsupported) where llama.cpp can't apply such an adapter, as with DoRA.
    """
    config = json.loads((adapter / _CONFIG).read_bytes())
    refuse_unknown(config)
    with (
        converter.shown(folder, "model", trusted=trust_remote_code) as base,
        tempfile.TemporaryDirectory(prefix="adapter-") as temporary,
        replacing(target) as partial,
    ):
        view = Path(temporary, target.stem)  # the file's general.name is made of it
        view.mkdir()
        (view / _CONFIG).write_text(json.dumps(as_llama_reads_it(config)))
        (view / _WEIGHTS).symlink_to((adapter / _WEIGHTS).resolve())
        command = [sys.executable, str(converter.llama_folder() / SCRIPT), str(view)]
        command += ["--base", str(base), "--outtype", "f32", "--outfile", str(partial)]
        if trust_remote_code:
            command.append("--trust-remote-code")
        converter.run(command, trusted=trust_remote_code)


def refuse_unknown(config: dict[str, Any]) -> None:
    """Raise StageError for what llama.cpp would leave out without a word."""
    found = [name for name in _UNKNOWN if config.get(name)]
    if config.get("bias") not in (None, "none"):
        found.append("bias")
    if found:
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            f"llama.cpp can't apply this adapter alone, since its {_CONFIG} sets "
            f"{', '.join(found)}: set spec.export.adapterGguf to false; the GGUF files of the "
            "merged model are not concerned.",
        )


def as_llama_reads_it(config: dict[str, Any]) -> dict[str, Any]:
    """The same adapter for llama.cpp, which always scales by alpha / r.

    rsLoRA scales by alpha / sqrt(r), that is (alpha sqrt(r)) / r.
    """
    if not config.get("use_rslora"):
        return config
    return {**config, "lora_alpha": config["lora_alpha"] * math.sqrt(config["r"])}
