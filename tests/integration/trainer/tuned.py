"""Tiny tuned models and their GGUF files, merged the plain way: by PEFT, as a whole.

The gate's tests hold files against base model and adapter that nothing of the export's own code
made, but for the conversion itself.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from finetune_trainer.contract import Export, Quantization
from finetune_trainer.export.gate import SourceGate, expect
from finetune_trainer.export.gate.expected import GateInputs
from finetune_trainer.export.gate.kept import KeptFigures
from finetune_trainer.export.gguf.files import GgufSource, quantize, write_unquantized
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.converter import gguf_name, llama_folder
from finetune_trainer.model.loading import load_model
from finetune_trainer.model.tokenizer import (
    begins_with_bos,
    load_tokenizer,
    message_pair,
    save_tokenizer,
)
from tests.integration.trainer.conftest import ROWS
from tests.integration.trainer.families import FAMILIES, write_family, write_tokenizer

EXAMPLES = [message_pair(*row) for row in ROWS]
OTHERS = {
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "qwen3_moe": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
"""Targets of architectures that have not the separate layers of most."""

SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def open_gate(inputs: GateInputs, workspace: Path) -> SourceGate:
    """Of an export that has no earlier attempt."""
    return SourceGate.ask(expect(inputs, workspace), KeptFigures())


@dataclass(frozen=True)
class Tuned:
    """A base model, an adapter that changes much, and both merged."""

    base: Path
    adapter: Path
    merged: Path
    own: Quantization
    """The 16-bit type of its weights."""

    files: Path
    """Folder with GGUF files, each named after its type."""

    def file(self, kind: Quantization) -> Path:
        """A GGUF file of the merged model, made when it is asked for first."""
        file = self.files / f"{kind}.gguf"
        if not file.exists() and kind is self.own:
            bos, name = (
                begins_with_bos(load_tokenizer(ModelFolder(self.merged))),
                gguf_name("tiny", self.merged),
            )
            model = GgufSource(
                ModelFolder(self.merged),
                None,
                ModelFolder(self.merged),
                name,
                kind,
                begins_with_bos=bos,
            )
            write_unquantized(model, file, kind)
        elif not file.exists():
            quantize(self.file(self.own), file, kind)
        return file

    def gate(self, workspace: Path, **export: Any) -> SourceGate:
        """A gate that has seen nothing yet."""
        return open_gate(self.inputs(**export), workspace)

    def inputs(self, *, merged: bool = False, **export: Any) -> GateInputs:
        """What a gate is opened with."""
        return GateInputs(
            base=ModelFolder(self.base),
            adapter=self.adapter,
            examples=EXAMPLES,
            export=Export(**export),
            merged=ModelFolder(self.merged) if merged else None,
        )


def make_tuned(name: str, folder: Path, dtype: torch.dtype, **shape: Any) -> Tuned:
    """A tuned model of one of the families."""
    base, adapter, merged = folder / "base", folder / "adapter", folder / "merged"
    (folder / "gguf").mkdir(parents=True)
    family = FAMILIES[name]
    # With larger weights a random model is so sure of its tokens that rounding changes them.
    write_family(
        replace(family, shape={**family.shape, "initializer_range": 0.06, **shape}), base, dtype
    )
    make_adapter(base, adapter, OTHERS.get(family.kind, SEPARATE))
    model = PeftModel.from_pretrained(load_model(ModelFolder(base), torch.float32, "cpu"), adapter)
    model.merge_and_unload().to(dtype).save_pretrained(merged)
    write_tokenizer(family, merged)
    own = Quantization.BF16 if dtype is torch.bfloat16 else Quantization.F16
    return Tuned(base, adapter, merged, own, folder / "gguf")


def make_adapter(base: Path, folder: Path, targets: tuple[str, ...]) -> None:
    """An adapter that changes each target by about a fifth of its weights' size.

    PEFT's random B is large; a training's B would be zero at first and the test show nothing.
    """
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False, lora_dropout=0
    )
    model = get_peft_model(load_model(ModelFolder(base), torch.float32, "cpu"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.3)
    model.save_pretrained(str(folder))
    save_tokenizer(load_tokenizer(ModelFolder(base)), base, folder)


def write_lora(tuned: Tuned, file: Path) -> Path:
    """By llama.cpp's own script."""
    command = [
        sys.executable,
        str(llama_folder() / "convert_lora_to_gguf.py"),
        str(tuned.adapter),
        f"--base={tuned.base}",
        f"--outfile={file}",
        "--outtype=f32",
    ]
    subprocess.run(command, check=True, capture_output=True)
    return file
