"""What a base model can't do fails in `prepare`, before its weights are fetched."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from finetune_trainer.contract import (
    Example,
    Export,
    Lora,
    Reason,
    RunConfig,
    StageError,
)
from finetune_trainer.model import ModelFolder, adapter, base_model, converter
from finetune_trainer.model.shape import Shape
from finetune_trainer.model.tokenizer import message_pair
from finetune_trainer.prepare import checks, prepare_stage
from finetune_trainer.prepare.prepare_stage import check_config, plan_training
from finetune_trainer.runtime.reporter import Reporter
from hack.object_store import Credentials
from tests.integration.trainer.families import FAMILIES, write_family
from tests.integration.trainer.narrow import to_fp8

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can all."""
    return write_family(FAMILIES["smollm2"], tmp_path_factory.mktemp("models") / "good")


@pytest.fixture
def changed(good: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(good, tmp_path / "changed"))


def run_config(folder: Path | str, **parts: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"source": str(folder)},
            "dataset": {"source": "/data/train.csv"},
            "output": {"uri": "/out"},
            **parts,
        }
    )


def check(
    folder: Path, workspace: Path, rows: Mapping[str, Example] | None = None, **parts: Any
) -> str:
    config = run_config(folder, **parts)
    files = base_model.find(config.model, config.storage)
    return checks.check_model(config, files, ModelFolder(folder), workspace, Reporter(), rows=rows)


def refused(folder: Path, workspace: Path) -> str:
    with pytest.raises(StageError) as caught:
        check(folder, workspace)
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED
    assert "leave spec.export.gguf empty" in caught.value.message
    check(folder, workspace, export={"gguf": []})
    return caught.value.message


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_model_in_a_bucket_is_checked_without_fetching_its_weights(
    good: Path, bucket: str, moto: Credentials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The headers are longer than what is read at first."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", moto.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", moto.secret_key)
    monkeypatch.setattr(converter, "FIRST_BYTES", 64)
    client = moto.client()
    small = tmp_path / "small"
    small.mkdir()
    for file in good.iterdir():
        client.upload_file(str(file), bucket, f"models/good/{file.name}")
        if file.name != WEIGHTS:
            shutil.copy(file, small)
    config = run_config(f"s3://{bucket}/models/good", storage={"endpoint": moto.endpoint})
    files = base_model.find(config.model, config.storage)
    checks.check_model(config, files, ModelFolder(small), tmp_path, Reporter())

    stand_in = tmp_path / "rehearsal" / WEIGHTS
    assert load_file(stand_in).keys() == load_file(good / WEIGHTS).keys()
    assert stand_in.stat().st_size >= (good / WEIGHTS).stat().st_size - 4096  # the padding
    assert stand_in.stat().st_blocks * 512 < 100_000, "it takes no room"
    assert (tmp_path / "rehearsal.gguf").stat().st_size < 3_000_000, "the vocabulary alone"


def test_an_architecture_that_the_converter_does_not_know(changed: Path, tmp_path: Path) -> None:
    change(changed / "config.json", architectures=["UnheardOfForCausalLM"])
    assert "UnheardOfForCausalLM" in refused(changed, tmp_path)


def test_a_tokenizer_that_the_converter_does_not_know(changed: Path, tmp_path: Path) -> None:
    file = changed / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"].pop(3)
    file.write_text(json.dumps(content))
    assert "pre-tokenizer was not recognized" in refused(changed, tmp_path)


def test_a_tokenizer_that_llama_cpp_reads_otherwise(tmp_path: Path) -> None:
    """llama.cpp takes Phi-3's special tokens to swallow space, and can't be told otherwise."""
    folder = write_family(FAMILIES["phi-3"], tmp_path / "phi-3")
    check(folder, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(re.sub(r'("rstrip": ?)true', r"\1false", text))
    message = refused(folder, tmp_path)
    assert "splits 1 of 6 texts into other tokens" in message
    assert "in '<|user|>\\n3 33 333" in message
    assert "set spec.export.verify to off" in message
    check(folder, tmp_path, export={"verify": "off"})


def test_a_row_that_the_tokenizer_normalises_is_no_fault_of_the_model(tmp_path: Path) -> None:
    """Qwen's tokenizer composes characters (NFC), and llama.cpp doesn't."""
    folder = write_family(FAMILIES["qwen2.5"], tmp_path / "qwen")
    rows = {
        "row 3": message_pair("What does it draw?", "Five amperes."),
        "row 7": message_pair("How large is the resistor?", "It has 10 \N{OHM SIGN}."),
    }
    said = check(folder, tmp_path, rows)
    assert "splits some rows into other tokens than the training: row 7. " in said
    assert "normal form C" in said


def test_a_tensor_that_the_converter_does_not_know(changed: Path, tmp_path: Path) -> None:
    weights = load_file(changed / WEIGHTS)
    weights["reward_head.weight"] = weights["model.norm.weight"].clone()
    save_file(weights, changed / WEIGHTS, {"format": "pt"})
    assert "reward_head" in refused(changed, tmp_path)


def test_weights_that_are_no_safetensors(changed: Path, tmp_path: Path) -> None:
    (changed / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(
        StageError, match=r"model.safetensors of .* is no safetensors file"
    ) as caught:
        check(changed, tmp_path)
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED


@pytest.mark.parametrize("width", [40, 576, 512])
def test_widths_that_llama_cpp_does_not_quantize(
    width: int, caplog: pytest.LogCaptureFixture
) -> None:
    shape = Shape("llama", 2, width, width, width, 128, 512, tied=True)
    check_widths: Callable[[list[str]], None] = lambda kinds: checks.check_widths(  # noqa: E731 - short
        Export.model_validate({"gguf": kinds}), shape
    )
    check_widths(["F32", "F16", "BF16"])
    assert not caplog.messages
    if width == 40:
        with pytest.raises(StageError, match="to Q8_0, Q4_K_M: its hidden size 40"):
            check_widths(["F16", "Q8_0", "Q4_K_M"])
        return
    check_widths(["Q8_0", "Q4_K_M"])
    assert bool(caplog.messages) is (width == 576)


def test_a_quantized_base_that_is_not_read_is_refused_before_a_training(
    changed: Path, tmp_path: Path
) -> None:
    change(changed / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(StageError, match=r"quantized \(gptq\).*in 16 bits") as caught:
        check(changed, tmp_path, export={"gguf": []})
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED
    check(changed, tmp_path, export={"gguf": [], "merged": False})  # nothing is merged


def test_a_base_in_eight_bits_is_rehearsed_in_sixteen(good: Path, tmp_path: Path) -> None:
    narrow = to_fp8(good, tmp_path / "narrow", (16, 16))
    check(narrow, tmp_path)
    seen = tmp_path / "rehearsal" / WEIGHTS
    assert {name: t.dtype for name, t in load_file(seen).items()} == {
        name: t.dtype for name, t in load_file(good / WEIGHTS).items()
    }
    assert "quantization_config" not in json.loads((seen.parent / "config.json").read_bytes())
    hardware = {"exportStorageBytes": (1 << 50)}
    config = run_config(narrow, hardware=hardware, training={"maxSequenceLength": 64})
    with pytest.MonkeyPatch.context() as patch:
        needs: list[int] = []
        patch.setattr(prepare_stage, "check_disks", lambda *seen: needs.append(seen[2]))
        for folder in (good, narrow):
            files = base_model.find(config.model, config.storage)
            with suppress(StageError):
                plan_training(config, files, ModelFolder(folder), longest=64)
    shape = Shape.of_model(good)
    assert shape
    assert needs == [0, 2 * shape.parameters], "it is on the disk in 16 bits as well"


def test_weights_of_eight_bits_are_found_in_the_files(changed: Path, tmp_path: Path) -> None:
    weights = load_file(changed / "model.safetensors")
    name = next(name for name in weights if "q_proj" in name)
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, changed / "model.safetensors")
    with pytest.raises(StageError, match=r"quantized \(F8_E4M3\)"):
        check(changed, tmp_path)


def test_too_little_disk_for_the_export_is_refused_before_a_training(good: Path) -> None:
    hardware = {"exportStorageBytes": 1 << 20}
    config = run_config(good, hardware=hardware, training={"maxSequenceLength": 64})
    files = base_model.find(config.model, config.storage)
    with pytest.raises(StageError, match=r"The export needs .* disk") as caught:
        plan_training(config, files, ModelFolder(good), longest=64)
    assert caught.value.reason is Reason.OUT_OF_DISK
    assert "stages.export.resources.limits.ephemeral-storage" in caught.value.message


def layers(*names: str) -> list[str]:
    return [f"model.layers.{n}.mlp.{name}.weight" for n in range(2) for name in names]


def refused_targets(names: Sequence[str], base: ModelFolder, tensors: list[str]) -> str:
    with pytest.raises(StageError) as caught:
        checks.check_targets(Lora(target_modules=tuple(names)), base, tensors)
    assert caught.value.reason is Reason.INVALID_CONFIG
    assert caught.value.message.startswith("spec.training.lora.targetModules: ")
    return caught.value.message


def outline_in_this_process(model: ModelFolder, lora: Lora) -> adapter.AdapterOutline:
    return adapter.outline_here(adapter.OutlineRequest(model=model, lora=lora))


def test_target_modules_that_the_model_lacks() -> None:
    nowhere, names = ModelFolder(Path("/nowhere")), ["q_proj", "gate_proj", "down_proj"]
    lora = Lora(target_modules=tuple(names))
    checks.check_targets(lora, nowhere, layers("qkv_proj", "gate_up_proj", "down_proj"))
    message = refused_targets(names, nowhere, layers("q_proj", "up_proj", "fc2"))
    assert "has no linear layer gate_proj, down_proj." in message
    assert "are fc2, q_proj, up_proj: set it to some of them" in message
    # A vision tower's layers of the same name are none of the text's.
    assert "are none" in refused_targets(names, nowhere, ["vision_tower.layers.0.q_proj.weight"])


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["mlp.fc1"], "has no linear layer mlp.fc1"),
        (["lm_head"], "lm_head is the input embedding or the output layer, and gets no adapter"),
        (["q_proj", "input_layernorm"], "has no linear layer input_layernorm"),
        (["layers.2.self_attn.q_proj"], "has no linear layer layers.2.self_attn.q_proj"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_names_beyond_the_usual_ones_are_looked_up_in_the_model(
    good: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], words: str
) -> None:
    if names != ["mlp.fc1"]:  # a process for one of them is enough
        monkeypatch.setattr(checks, "outline_adapter", outline_in_this_process)
    message = refused_targets(names, ModelFolder(good), [])
    assert words in message
    assert "are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj:" in message


SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
DEEPSEEK = {
    **SHAPE,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
# As Mixtral's files name the layers of each expert; transformers holds all of them in one tensor.
OF_AN_EXPERT = ["model.layers.0.block_sparse_moe.experts.0.w1.weight"]


@pytest.mark.parametrize(
    ("kind", "shape", "names", "words"),
    [
        ("mixtral", {**SHAPE, "num_local_experts": 4}, ["all-linear"], None),
        ("mixtral", {**SHAPE, "num_local_experts": 4}, ["q_proj", "v_proj"], None),
        (
            "mixtral",
            {**SHAPE, "num_local_experts": 4},
            ["experts.down_proj"],
            "experts.down_proj holds all experts of a layer at once: name it in targetParameters",
        ),
        (
            "mixtral",
            {**SHAPE, "num_local_experts": 4},
            ["q_proj", "gate_proj"],
            "no linear layer gate_proj. Its linear layers are k_proj, o_proj, q_proj, v_proj",
        ),
        ("deepseek_v3", DEEPSEEK, ["q_a_proj", "kv_b_proj"], None),
        ("deepseek_v3", DEEPSEEK, ["all-linear"], "adapt model.layers.1.mlp.experts as well"),
    ],
)
@pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")
def test_experts_are_refused_by_name_and_what_is_around_them_is_adapted(
    kind: str, shape: dict[str, Any], names: list[str], words: str | None, tmp_path: Path
) -> None:
    AutoConfig.for_model(kind, **shape).save_pretrained(tmp_path)
    lora = Lora(target_modules=tuple(names), dropout=0)
    assert not adapter.told_by_files(lora, OF_AN_EXPERT)
    if words is None:
        outline = outline_in_this_process(ModelFolder(tmp_path), lora)
        assert not [name for name in outline.tensors if "experts" in name]
        return
    with pytest.raises(StageError, match=re.escape(words)) as caught:
        outline_in_this_process(ModelFolder(tmp_path), lora)
    assert caught.value.reason is Reason.INVALID_CONFIG


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"export": {"adapterGguf": True}}, "spec.export.adapterGguf: training.method full"),
        ({"export": {"merged": False, "gguf": []}}, "nothing would be published"),
        ({"trust": True}, "a model that brings its own code"),
    ],
)
def test_what_full_fine_tuning_cannot_do_is_refused(changes: dict[str, Any], said: str) -> None:
    full: dict[str, Any] = {"training": {"method": "full"}}
    check_config(run_config("/model", **full))
    check_config(run_config("/model", **full, export={"merged": False, "gguf": ["F16"]}))
    trust = changes.pop("trust", False)
    config = run_config("/model", **full, **changes)
    model = config.model.model_copy(update={"trust_remote_code": trust})
    with pytest.raises(StageError, match="full") as caught:
        check_config(config.model_copy(update={"model": model}))
    assert caught.value.reason is Reason.INVALID_CONFIG
    assert said in caught.value.message


def test_only_embedding_and_output_layer_are_trained_as_a_whole(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "outline_adapter", outline_in_this_process)
    checks.check_targets(Lora(modules_to_save=("embed_tokens",)), ModelFolder(good), [])
    with pytest.raises(StageError, match=r"modulesToSave: norm is neither .* are embed_tokens and"):
        checks.check_targets(Lora(modules_to_save=("norm",)), ModelFolder(good), [])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"export": {"adapterGguf": True}}, "spec.export.adapterGguf: llama.cpp can't apply"),
        ({"training": {"parallelism": "fsdp"}}, "spec.training.parallelism: fsdp can't spread"),
    ],
)
def test_what_modules_trained_as_a_whole_do_not_go_with(more: dict[str, Any], words: str) -> None:
    lora = {"lora": {"modulesToSave": ["lm_head"]}}
    check_config(run_config("/model", training=lora))
    parts = {**more, "training": {**lora, **more.get("training", {})}}
    with pytest.raises(StageError, match=re.escape(words)) as caught:
        check_config(run_config("/model", **parts))
    assert caught.value.reason is Reason.INVALID_CONFIG


def test_a_dora_adapter_alone_as_gguf_is_refused() -> None:
    lora = {"lora": {"useDora": True}}
    check_config(run_config("/model", training=lora))
    with pytest.raises(StageError, match="can't apply a DoRA adapter") as caught:
        check_config(run_config("/model", training=lora, export={"adapterGguf": True}))
    assert caught.value.reason is Reason.INVALID_CONFIG
