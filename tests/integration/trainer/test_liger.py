"""Liger's kernels are taken where they are installed and right.

They run on a GPU alone (Triton's interpreter fails at their norm), so a stand-in takes their place:
a package of the same name that changes a model as Liger does, rightly or not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers.models.llama import modeling_llama

from finetune_trainer.train.recipe import lora
from tests.integration.trainer.architectures import tiny

PACKAGE = """
import torch
from transformers.models.llama import modeling_llama

seen = []


def _apply_liger_kernel_to_instance(model, **options):
    seen.append((model.config.num_hidden_layers, options))
    modeling_llama.apply_rotary_pos_emb = turned
    for module in model.modules():
        if isinstance(module, modeling_llama.LlamaRMSNorm):
            module.forward = norm(module)


def turned(*arguments, **options):
    return original(*arguments, **options)


def norm(module):
    def forward(x):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], module.weight, EPSILON)
    return forward


original = modeling_llama.apply_rotary_pos_emb
"""


@pytest.fixture
def _install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    package = tmp_path / "liger_kernel"
    package.mkdir()
    (package / "__init__.py").write_text("")
    code = PACKAGE.replace("EPSILON", request.param)
    (package / "transformers.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    # Put back after the test, whatever the package made of it.
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)


def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, but for the proof, which stays on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    prove = lora.liger_is_right
    monkeypatch.setattr(lora, "liger_is_right", lambda model, _: prove(model, "cpu"))


@pytest.mark.usefixtures("_install")
@pytest.mark.parametrize("_install", ["module.variance_epsilon"], indirect=True)
def test_kernels_that_are_right_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch)
    model = tiny("llama")
    ids = torch.arange(1, 20)[None]
    before = model(input_ids=ids).logits
    assert lora.use_liger(model)
    from liger_kernel import transformers as stand_in

    assert [layers for layers, _ in stand_in.seen] == [1, 3], "first a proof, then the model"
    assert stand_in.seen[1][1] == {"fused_linear_cross_entropy": False, "cross_entropy": False}
    assert modeling_llama.apply_rotary_pos_emb is stand_in.turned
    torch.testing.assert_close(model(input_ids=ids).logits, before)


@pytest.mark.usefixtures("_install")
@pytest.mark.parametrize("_install", ["0.5", "undefined"], indirect=True)
def test_kernels_that_are_wrong_or_fail_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on_gpu(monkeypatch)
    model = tiny("llama")
    positions = modeling_llama.apply_rotary_pos_emb
    ids = torch.arange(1, 20)[None]
    before = model(input_ids=ids).logits
    assert not lora.use_liger(model)
    assert "Liger's kernels are left out" in caplog.text
    assert modeling_llama.apply_rotary_pos_emb is positions
    assert torch.equal(model(input_ids=ids).logits, before)


def test_nothing_is_tried_without_a_gpu_or_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    assert not lora.use_liger(model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(lora, "find_spec", lambda _: None)
    assert not lora.use_liger(model)
