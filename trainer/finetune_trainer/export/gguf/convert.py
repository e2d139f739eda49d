"""Base model and adapter to one GGUF file, and the adapter alone as one."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.contract import Quantization, Reason, StageError
from finetune_trainer.model import converter
from finetune_trainer.model.converter import gguf_name
from finetune_trainer.model.loading import available_cpus
from finetune_trainer.runtime.child import shown_by
from finetune_trainer.runtime.progress import Reporter
from finetune_trainer.store.local import replacing

WORKER = "finetune_trainer.export.gguf.convert_worker"


@dataclass(frozen=True)
class Model:
    """What GGUF files are made of."""

    base: Path
    """Folder with the base model's weights, or with merged ones."""

    adapter: Path | None
    """Folder with the adapter that is merged into them."""

    folder: Path
    """Folder with configuration and tokenizer of the finished model."""

    name: str
    """What the files call it."""

    own: Quantization
    """The 16-bit type that its weights have: F16 or BF16."""

    begins_with_bos: bool = True
    """Whether servers put that token before a prompt. Some tokenizers do although their chat
    template doesn't: the training never saw it."""

    trust_remote_code: bool = False


def write_sixteen(
    model: Model, target: Path, kind: Quantization, *, reporter: Reporter | None = None
) -> None:
    """Write the merged model as F16, BF16 or F32 to the file `target`.

    Raises StageError: ModelUnsupported where llama.cpp does not know the model, or where F16 can't
    hold its values; what MergedWeights raises.
    """
    with (
        converter.shown(model.folder, model.name, trusted=model.trust_remote_code) as view,
        replacing(target) as partial,
    ):
        request = {
            "llama": str(converter.llama_folder()),
            "base": str(model.base),
            "adapter": model.adapter and str(model.adapter),
            "folder": str(view),
            "target": str(partial),
            "type": kind.value,
            "name": gguf_name(model.name, model.folder),
            "beginsWithBos": model.begins_with_bos,
            "threads": available_cpus(),
        }
        converter.run(
            [sys.executable, "-m", WORKER],
            json.dumps(request),
            trusted=model.trust_remote_code,
            on_progress=shown_by(reporter, f"Writing {target.name}"),
        )


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
