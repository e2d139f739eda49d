"""Adapters of a model's experts (PEFT's target_parameters): trained, merged, measured, refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from finetune_trainer.contract import Export, Lora, Reason, StageError
from finetune_trainer.export.export_stage import EXPERT, memory_need, widths_of
from finetune_trainer.export.gguf.files import write_adapter
from finetune_trainer.export.merge import MergedWeights
from finetune_trainer.export.reference import MeasuredRow
from finetune_trainer.export.reference.float32 import load_streamed, logits_of, logits_of_both
from finetune_trainer.memory.forecast import STAGE_BYTES, export_memory, reference_bytes
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.adapter import OutlineRequest, check_stored, lora_config, outline_here
from finetune_trainer.model.loading import load_model
from finetune_trainer.model.shape import Shape
from finetune_trainer.model.tokenizer import message_pair
from finetune_trainer.prepare.prepare_stage import check_config
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.train.recipe import sft
from finetune_trainer.train.recipe.saving import train_with_checkpoints
from tests.integration.trainer.conftest import ROWS, Processes
from tests.integration.trainer.recipe import build_from, make_work
from tests.integration.trainer.test_gate import took

EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
WIDTHS: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 72,
        "norm_topk_prob": True,  # as the published ones have it
    },
    "mixtral": {"num_local_experts": 4, "intermediate_size": 72},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 72},
}
"""Files with a matrix for each expert, under two names, and with all of them in one tensor that is
transposed. 72 is no multiple of what a thread computes at a time."""


def make(kind: str, folder: Path, words: int = 320, **widths: int) -> Path:
    """A tiny model with random weights in bfloat16."""
    torch.manual_seed(0)
    shape = {**WIDTHS, **KINDS[kind], **widths}
    config = AutoConfig.for_model(kind, vocab_size=words, head_dim=16, **shape)
    auto: Any = AutoModelForCausalLM
    model = cast("PreTrainedModel", auto.from_config(config))
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type] # transformers
    return folder


def adapted(base: Path, folder: Path) -> Path:
    """An adapter that changes every expert much."""
    lora = Lora(r=3, dropout=0, target_parameters=EXPERTS)
    model = load_model(ModelFolder(base), torch.float32, "cpu")
    tuned = get_peft_model(model, lora_config(lora, model))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def merged_by_peft(base: Path, adapter: Path, folder: Path) -> dict[str, torch.Tensor]:
    """In float32: in 16 bits PEFT rounds what it adds to experts before it adds it."""
    model = load_model(ModelFolder(base), torch.float32, "cpu")
    tuned: Any = PeftModel.from_pretrained(model, str(adapter))
    tuned.merge_and_unload().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def assert_merged_as_peft_does(base: Path, adapter: Path, folder: Path) -> MergedWeights:
    weights = MergedWeights.open(base, adapter)
    weights.check_changes()
    theirs = merged_by_peft(base, adapter, folder)
    assert weights.infos.keys() == theirs.keys()
    for name, info in weights.infos.items():
        assert torch.equal(weights.rows(name), theirs[name].to(info.dtype)), name
    return weights


@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_gets_the_bits_of_pefts_merge(kind: str, tmp_path: Path) -> None:
    base = make(kind, tmp_path / "base")
    adapter = adapted(base, tmp_path / "adapter")
    weights = assert_merged_as_peft_does(base, adapter, tmp_path / "theirs")
    parts = 2 if kind == "gpt_oss" else 3 * 4  # of each layer, beside attention
    assert len(weights.targets) == 2 * (4 + parts)
    # Some rows, or some experts, are those of the whole tensor.
    for name in weights.targets:
        whole = weights.rows(name)
        assert torch.equal(weights.rows(name, 1, 3), whole[1:3])


@pytest.mark.parametrize("kind", KINDS)
def test_the_gate_s_reference_runs_experts_unmerged(kind: str, tmp_path: Path) -> None:
    base = make(kind, tmp_path / "base")
    adapter = adapted(base, tmp_path / "adapter")
    rows = [MeasuredRow(tuple(range(1, 30)), (20, 28)), MeasuredRow(tuple(range(60, 70)), (3, 9))]
    loaded = PeftModel.from_pretrained(load_model(ModelFolder(base), torch.float32, "cpu"), adapter)
    expected = logits_of(loaded.eval(), rows)
    with loaded.disable_adapter():
        expected = torch.cat([expected, logits_of(loaded, rows)])
    ours = load_streamed(ModelFolder(base), adapter)
    assert isinstance(ours, PeftModel)
    torch.testing.assert_close(logits_of_both(ours, rows), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_the_reference_of_experts_takes_what_was_predicted(
    kind: str, processes: Processes, tmp_path: Path
) -> None:
    """96 MiB of experts: stacked by transformers, or mapped; one at a time in float32."""
    many = {"qwen3_moe": "num_experts", "gpt_oss": "num_local_experts"}[kind]
    wide = {"qwen3_moe": "moe_intermediate_size", "gpt_oss": "intermediate_size"}[kind]
    widths = {"hidden_size": 256, "num_hidden_layers": 4, many: 16, wide: 1024}
    base = make(kind, tmp_path / "base", 2048, **widths)
    loaded = load_model(ModelFolder(base), torch.bfloat16, "cpu")
    tuned = get_peft_model(loaded, lora_config(Lora(dropout=0), loaded))
    tuned.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    weights = MergedWeights.open(base, tmp_path / "adapter")
    stacked = sum(each.nbytes for name, each in weights.infos.items() if EXPERT.search(name))
    assert stacked == (96 << 20 if kind == "qwen3_moe" else 0)
    predicted = reference_bytes(widths_of(weights)) + stacked
    files = [base / "model.safetensors", tmp_path / "tuned.npy", tmp_path / "base.npy"]
    measured = took(processes, "reference", base, tmp_path / "adapter", tmp_path)
    measured -= sum(file.stat().st_size for file in files)
    # With 96 MiB of experts the rest is small, and processors differ in what their kernels take.
    assert 0.9 * measured < predicted < 2.4 * measured
    wanted = memory_need(weights, Export(gguf=()))
    assert wanted == 2 * STAGE_BYTES + predicted, "of the whole export"

    shape = Shape.of_model(base)
    assert shape is not None
    for export in (Export(gguf=()), Export(), Export(verify="off")):  # and what `prepare` says
        assert 0 <= export_memory(shape, export) / memory_need(weights, export) - 1 < 0.1


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen 3 with experts, and a real tokenizer."""
    folder = make("qwen3_moe", tmp_path_factory.mktemp("models") / "experts", 49152)
    for file in tiny_model.glob("*token*"):
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").symlink_to(tiny_model / "chat_template.jinja")
    return folder


SETTINGS: dict[str, Any] = {
    "learningRate": 0.01,
    "batchSize": 2,
    "gradientAccumulationSteps": 1,
    "lora": {"r": 3, "dropout": 0, "targetParameters": list(EXPERTS)},
}


def test_experts_are_trained_and_merged(model: Path, tmp_path: Path) -> None:
    rows = [message_pair(*row) for row in ROWS]
    work = make_work(model, tmp_path, rows, epochs=2, **SETTINGS)
    trained = sft.fine_tune(work, Reporter())
    metrics = trained.metrics
    assert (metrics.train_loss or 0) < (trained.history[0].loss or 0)
    saved = load_file(work.adapter / "adapter_model.safetensors")
    assert all(each.any() for each in saved.values()), "B is trained"
    assert sum(each.numel() for each in saved.values()) == metrics.trainable_parameters
    outline = outline_here(OutlineRequest(model=work.model, lora=work.config.training.lora))
    assert outline.tensors == {name: tuple(each.shape) for name, each in saved.items()}
    config = json.loads((work.adapter / "adapter_config.json").read_bytes())
    assert sorted(config["target_parameters"]) == sorted(EXPERTS)
    assert_merged_as_peft_does(model, work.adapter, tmp_path / "theirs")
    with pytest.raises(StageError, match="sets target_parameters"):
        write_adapter(work.model, work.adapter, tmp_path / "adapter.gguf")


def test_a_training_of_experts_goes_on_where_it_was_broken_off(model: Path, tmp_path: Path) -> None:
    """Bit for bit, also where layers are computed again."""
    rows = [message_pair(*row) for row in ROWS[:4]]
    work = make_work(model, tmp_path, rows, epochs=1, checkpointSteps=1, **SETTINGS)
    plan = work.plan.model_copy(update={"gradient_checkpointing": True})
    work = work.model_copy(update={"plan": plan})

    def finish(resume_from: Path | None) -> dict[str, torch.Tensor]:
        started = work.model_copy(update={"resume_from": resume_from})
        trainer: Any = build_from(started)
        train_with_checkpoints(trainer, started, None)
        return {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}

    whole = finish(None)
    (checkpoint,) = work.checkpoints.iterdir()
    assert checkpoint.name == "checkpoint-1"
    resumed = finish(checkpoint)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_an_expert_that_no_token_came_to_may_stay_as_it_is(tmp_path: Path) -> None:
    base = make("qwen3_moe", tmp_path / "base")
    adapter = adapted(base, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    from safetensors.torch import save_file

    for name, value in tensors.items():
        if "experts" in name and "lora_B" in name:
            value.view(-1, 3, 4)[:, :, 1] = 0  # the second expert
    save_file(tensors, file, {"format": "pt"})
    MergedWeights.open(base, adapter).check_changes()
    save_file({n: v * ("experts" not in n) for n, v in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(StageError, match="changed nothing in 24 of 32 targets"):
        MergedWeights.open(base, adapter).check_changes()


@pytest.mark.parametrize("other", [{"dropout": 0.1}, {"dropout": 0, "useDora": True}])
def test_what_peft_cannot_do_with_experts_is_refused_by_field(other: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="must have dropout 0 and no useDora"):
        Lora.model_validate({"targetParameters": [EXPERTS[0]], **other})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"method": "qlora"}}, "spec.training.lora.targetParameters: experts that"),
        ({"training": {"parallelism": "fsdp"}}, "spec.training.parallelism: fsdp can't spread"),
        ({"export": {"adapterGguf": True}}, "spec.export.adapterGguf: llama.cpp can't apply"),
    ],
)
def test_what_cannot_be_done_with_experts_ends_prepare(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    work = make_work(tmp_path, tmp_path, [], **{**SETTINGS, **changes.get("training", {})})
    config = work.config
    if "export" in changes:
        export = config.export.model_copy(update={"adapter_gguf": True})
        config = config.model_copy(update={"export": export})
    with pytest.raises(StageError, match=re.escape(words)) as caught:
        check_config(config)
    assert caught.value.reason is Reason.INVALID_CONFIG


def test_parameters_that_are_not_there_are_refused_with_those_that_are(tmp_path: Path) -> None:
    base = make("qwen3_moe", tmp_path / "base")
    lora = Lora(dropout=0, target_parameters=("mlp.experts.up_proj",))
    with pytest.raises(StageError, match=r"no parameter mlp\.experts\.up_proj") as caught:
        outline_here(OutlineRequest(model=ModelFolder(base), lora=lora))
    assert "mlp.experts.down_proj, mlp.experts.gate_up_proj" in caught.value.message


def test_files_that_hold_experts_in_another_way_are_refused_before_the_training() -> None:
    config = AutoConfig.for_model("qwen3_vl_moe")
    for part in (config.text_config, config.vision_config):
        part.update({"num_hidden_layers": 1, "depth": 1, "hidden_size": 64})
    from transformers import Qwen3VLMoeForConditionalGeneration

    with torch.device("meta"):
        model: Any = Qwen3VLMoeForConditionalGeneration(config)  # type: ignore[no-untyped-call]
    with pytest.raises(StageError, match="in a way that an adapter can't be merged into"):
        check_stored(model, ["mlp.experts.down_proj"])
