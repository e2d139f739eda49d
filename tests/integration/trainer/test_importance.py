"""The importance matrix holds what the layers of the tuned model see on training rows."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from transformers import AutoModelForCausalLM

from finetune_trainer.contract import Example
from finetune_trainer.export.gguf import INPUT_COUNTS, INPUT_SUMS, importance
from finetune_trainer.export.gguf.files import GgufSource
from finetune_trainer.export.gguf.importance import chunks, write_importance
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.tokenizer import load_tokenizer
from finetune_trainer.runtime.reporter import Reporter
from tests.integration.trainer.families import WIDE
from tests.integration.trainer.tuned import EXAMPLES, Tuned, make_tuned

HEADS = {"smollm2": "token_embd.weight", "phi-3": "output.weight"}  # tied, and not


@pytest.fixture(scope="module", params=sorted(HEADS))
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Tuned, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("importance")
    tuned = make_tuned(request.param, folder, torch.bfloat16, **WIDE)
    model = GgufSource(
        ModelFolder(tuned.base), tuned.adapter, ModelFolder(tuned.merged), "tiny", tuned.own
    )
    target = folder / "importance.gguf"
    write_importance(model, tuned.file(tuned.own), EXAMPLES, target, Reporter())
    found = {item.name: np.asarray(item.data) for item in GGUFReader(target).tensors}
    return request.param, tuned, found


def test_every_matrix_of_the_file_is_measured(
    measured: tuple[str, Tuned, dict[str, np.ndarray]],
) -> None:
    name, tuned, found = measured
    tensors = GGUFReader(tuned.file(tuned.own)).tensors
    blocks = {t.name: t for t in tensors if t.name.startswith("blk.") and len(t.shape) == 2}
    names = {each.removesuffix(INPUT_SUMS) for each in found if each.endswith(INPUT_SUMS)}
    assert names == blocks.keys() | {HEADS[name]}
    for each, tensor in blocks.items():
        assert found[each + INPUT_SUMS].shape == (1, tensor.shape[0])


def test_it_is_what_the_tuned_model_sees(
    measured: tuple[str, Tuned, dict[str, np.ndarray]],
) -> None:
    name, tuned, found = measured
    base = AutoModelForCausalLM.from_pretrained(tuned.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tuned.adapter).eval()
    layer = "qkv_proj" if name == "phi-3" else "q_proj"
    inputs: list[torch.Tensor] = []
    attention = model.get_submodule("base_model.model.model.layers.1.self_attn")
    attention.get_submodule(layer).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    pieces = list(chunks(load_tokenizer(ModelFolder(tuned.merged)), EXAMPLES))
    with torch.no_grad():
        for piece in pieces:
            model(input_ids=torch.tensor([piece]))
    seen = torch.cat([each[0] for each in inputs]).numpy()
    key = "blk.1.attn_qkv.weight" if name == "phi-3" else "blk.1.attn_q.weight"
    assert found[key + INPUT_COUNTS].item() == len(seen) == sum(len(piece) for piece in pieces)
    np.testing.assert_allclose(found[key + INPUT_SUMS][0], (seen**2).sum(axis=0), rtol=1e-3)


def test_rows_are_laid_end_to_end_up_to_a_limit(
    measured: tuple[str, Tuned, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tuned, _ = measured
    tokenizer = load_tokenizer(ModelFolder(tuned.merged))
    whole = [token for piece in chunks(tokenizer, EXAMPLES) for token in piece]
    monkeypatch.setattr(importance, "CHUNK_TOKENS", 20)
    pieces = list(chunks(tokenizer, EXAMPLES))
    assert [token for piece in pieces for token in piece] == whole
    assert {len(piece) for piece in pieces[:-1]} == {20}
    monkeypatch.setattr(importance, "MAX_CHUNKS", 2)
    assert list(chunks(tokenizer, EXAMPLES)) == pieces[:2]


def test_rows_of_a_sorted_file_are_read_from_all_over_it(
    measured: tuple[str, Tuned, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tuned, _ = measured
    tokenizer = load_tokenizer(ModelFolder(tuned.merged))
    numbered = [
        Example(
            prompt=EXAMPLES[0]["prompt"],
            completion=[{"role": "assistant", "content": str(number)}],
        )
        for number in range(1000)
    ]
    monkeypatch.setattr(importance, "MAX_CHUNKS", 8)
    text = "".join(str(tokenizer.decode(piece)) for piece in chunks(tokenizer, numbered))
    read = [int(each) for each in re.findall(r"\d+", text) if len(each) == 3]
    assert 400 < np.mean(read) < 700
    assert min(read) < 200
    assert max(read) > 900
