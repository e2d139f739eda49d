"""What benchmarks.export runs in processes of its own.

python -m benchmarks.export_steps make FOLDER SHAPE        base/ and adapter/, random
python -m benchmarks.export_steps merge FOLDER             plain: PEFT's merge, saved as merged/
python -m benchmarks.export_steps quantize FROM TO TYPE    plain: as llama-quantize does
python -m benchmarks.export_steps ours FOLDER TYPE…        ours: FOLDER/ours/
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any


def main(step: str, *arguments: str) -> None:
    """Do one step."""
    {"make": make, "merge": merge, "quantize": quantize, "ours": ours}[step](*arguments)


SHAPES: dict[str, dict[str, int]] = {
    # By billions of parameters. Of the first, the vocabulary is SmolLM2's; the others have Llama
    # 3's, whose embedding and output layer are the largest tensors by far.
    "1.07": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "0.1": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8},
    "0.3": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16},
    "1": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 10},
    "2": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 11},
}
LARGE_VOCABULARY = 128_256


def make(folder: str, shape: str) -> None:
    """A Llama with random weights in bfloat16, and a LoRA adapter (r 16 on q, k, v and o)."""
    import torch  # noqa: PLC0415 - each step imports what it needs, since it is measured
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    from examples.base_model import smollm2  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    small = shape == "1.07"
    config = LlamaConfig(
        vocab_size=len(tokenizer) if small else LARGE_VOCABULARY,
        num_attention_heads=SHAPES[shape]["hidden_size"] // 64,
        num_key_value_heads=SHAPES[shape]["hidden_size"] // 256,
        tie_word_embeddings=small,
        bos_token_id=1,
        eos_token_id=2,
        **SHAPES[shape],
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters():,} parameters")
    base, adapter = Path(folder) / "base", Path(folder) / "adapter"
    model.save_pretrained(base)
    targets = [f"{name}_proj" for name in "qkvo"]
    tuned = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    tuned.save_pretrained(str(adapter))
    for each in (base, adapter):
        tokenizer.save_pretrained(each)


def merge(folder: str) -> None:
    """The few lines of the guides."""
    from peft import PeftModel  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    base, adapter, merged = (str(Path(folder) / name) for name in ("base", "adapter", "merged"))
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    tuned: Any = PeftModel.from_pretrained(model, adapter)
    tuned.merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(merged)


def quantize(source: str, target: str, kind: str) -> None:
    """llama-quantize's own defaults."""
    import llama_cpp  # noqa: PLC0415

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options))
    sys.exit(status)


def ours(folder: str, *kinds: str) -> None:
    """As the export stage does it."""
    from finetune_trainer.config import Quantization  # noqa: PLC0415
    from finetune_trainer.export.gguf.convert import Model  # noqa: PLC0415
    from finetune_trainer.export.gguf.files import write_files  # noqa: PLC0415
    from finetune_trainer.export.model_folder import assemble  # noqa: PLC0415
    from finetune_trainer.export.weights import MergedWeights  # noqa: PLC0415

    place = Path(folder)
    base, adapter, assembled = place / "base", place / "adapter", place / "assembled" / "model"
    weights = MergedWeights.open(base, adapter)
    weights.check_changes()
    assemble(base, adapter, assembled, dtype=weights.dtype)
    model = Model(base, adapter, assembled, "model", Quantization.BF16)
    for _ in write_files(model, place / "ours", [Quantization(kind) for kind in kinds]):
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
