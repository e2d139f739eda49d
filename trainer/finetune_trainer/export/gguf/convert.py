"""Base model and adapter to one GGUF file, without a merged model in between."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer.base_model import converter
from finetune_trainer.base_model.gguf_name import gguf_name
from finetune_trainer.base_model.loading import available_cpus
from finetune_trainer.config import Quantization
from finetune_trainer.export.gguf.showing import shown_by
from finetune_trainer.progress import Reporter
from finetune_trainer.storage.local import replacing

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
