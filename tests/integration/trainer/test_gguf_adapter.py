"""The adapter alone as GGUF: llama.cpp adds it to the base as PEFT merges it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.export.gguf.files import write_adapter
from finetune_trainer.model import ModelFolder
from tests.integration.trainer.adapters import merge_in_memory, save_adapter
from tests.integration.trainer.test_gguf_merge import convert

KINDS: dict[str, dict[str, Any]] = {"LoRA": {}, "rsLoRA": {"use_rslora": True}}
TEXT = b"Who made the kettle? The kettle was made by Odalys."


@pytest.fixture(scope="module")
def place(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in float32, adapters, and GGUF files in F32 of the base and of each merge."""
    place = tmp_path_factory.mktemp("adapters")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    base = place / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).save_pretrained(base)
    folders = [base]
    for kind, options in KINDS.items():
        adapter = save_adapter(base, place / f"adapter-{kind}", lora_alpha=11, **options)
        folders.append(merge_in_memory(base, adapter, place / kind))
    for folder in folders:
        tokenizer.save_pretrained(folder)
    convert(
        [{"folder": str(folder), "target": f"{folder}.gguf", "type": "f32"} for folder in folders]
    )
    return place


def logits(file: Path, adapter: Path | None = None) -> npt.NDArray[np.float32]:
    """Of each token of the text."""
    model = llama_cpp.Llama(
        model_path=str(file),
        lora_path=str(adapter) if adapter else None,
        logits_all=True,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
    )
    try:
        tokens = model.tokenize(TEXT)
        model.eval(tokens)
        return np.array(model.scores[: len(tokens)])
    finally:
        model.close()


def configuration_only(base: Path, folder: Path) -> Path:
    """The base without its weights."""
    ignore = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(base, folder, ignore=ignore))


@pytest.mark.parametrize("kind", KINDS)
def test_base_and_adapter_say_what_the_merged_model_says(
    place: Path, kind: str, tmp_path: Path
) -> None:
    folder = configuration_only(place / "base", tmp_path / "base")
    file = tmp_path / "out" / "tiny-LoRA-F32.gguf"
    write_adapter(ModelFolder(folder), place / f"adapter-{kind}", file)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    merged = logits(place / f"{kind}.gguf")
    np.testing.assert_allclose(logits(place / "base.gguf", file), merged, rtol=0, atol=2e-4)
    assert np.abs(logits(place / "base.gguf") - merged).max() > 0.1
    fields = gguf.GGUFReader(file).fields
    assert fields["general.type"].contents() == "adapter"
    assert fields["general.name"].contents() == "Tiny LoRA F32"
    assert str(place) not in str({name: field.contents() for name, field in fields.items()})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        (
            {"alpha_pattern": {"q_proj": 3}, "modules_to_save": ["lm_head"]},
            "modules_to_save, alpha",
        ),
    ],
)
def test_what_llama_cpp_can_not_apply_is_refused_by_name(
    place: Path, changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(place / "adapter-LoRA", tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(StageError) as caught:
        write_adapter(ModelFolder(place / "base"), adapter, tmp_path / "x.gguf")
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED
    assert said in caught.value.message
    assert "adapterGguf" in caught.value.message
