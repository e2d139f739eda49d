"""The finished model's folder: a model loaded from it behaves as PEFT's merged one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_trainer.export.merge.model_folder import assemble, stored_config, write_model
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.tokenizer import load_tokenizer, save_tokenizer
from tests.integration.trainer.adapters import SINGLE, merge_in_memory, save_adapter

END_OF_TURN = 2  # <|im_end|> of SmolLM2


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "base"))


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with the tokenizer, as `train` leaves it."""
    folder = save_adapter(tiny_model, tmp_path_factory.mktemp("adapters") / "adapter")
    save_tokenizer(load_tokenizer(ModelFolder(tiny_model)), tiny_model, folder)
    return folder


def read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_bytes()))


def write(file: Path, **fields: Any) -> None:
    """Change fields of a JSON file."""
    file.write_text(json.dumps({**(read(file) if file.exists() else {}), **fields}))


def test_the_model_behaves_as_the_one_that_peft_merged(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    ours, theirs = tmp_path / "ours", merge_in_memory(base, adapter, tmp_path / "theirs")
    write_model(ModelFolder(base), adapter, ours)
    assert read(ours / "config.json") == read(theirs / "config.json")
    assert (ours / SINGLE).read_bytes() == (theirs / SINGLE).read_bytes()
    assert {file.stat().st_mode & 0o777 for file in ours.iterdir()} == {0o644}
    prompt = AutoTokenizer.from_pretrained(ours)("How hot?", return_tensors="pt")
    with torch.no_grad():
        ours_said = AutoModelForCausalLM.from_pretrained(ours)(**prompt).logits
        theirs_said = AutoModelForCausalLM.from_pretrained(theirs)(**prompt).logits
    assert torch.equal(ours_said, theirs_said)


def test_a_folder_without_weights(base: Path, adapter: Path, tmp_path: Path) -> None:
    write(base / "preprocessor_config.json", image_mean=[0.5])
    assemble(ModelFolder(base), adapter, tmp_path / "ours")
    assert {file.name for file in (tmp_path / "ours").iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    ours = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert ours.chat_template == AutoTokenizer.from_pretrained(adapter).chat_template


@pytest.mark.parametrize(
    ("known", "expected"),
    [(0, [0, END_OF_TURN]), ([5, END_OF_TURN], [5, END_OF_TURN]), (None, END_OF_TURN)],
)
def test_generation_stops_at_every_end_of_turn(
    base: Path, adapter: Path, tmp_path: Path, known: Any, expected: Any
) -> None:
    """Settings that transformers itself would refuse to write stay as they are."""
    write(base / "generation_config.json", eos_token_id=known, do_sample=False, temperature=0.6)
    assemble(ModelFolder(base), adapter, tmp_path / "ours")
    settings = read(tmp_path / "ours" / "generation_config.json")
    assert settings["eos_token_id"] == expected
    assert settings["temperature"] == 0.6
    assert "_from_model_config" not in settings


def test_generation_settings_come_from_the_configuration_where_they_have_no_file(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    (base / "generation_config.json").unlink()
    write(base / "config.json", eos_token_id=7, bos_token_id=3)
    assemble(ModelFolder(base), adapter, tmp_path / "ours")
    settings = read(tmp_path / "ours" / "generation_config.json")
    assert settings["eos_token_id"] == [7, END_OF_TURN]
    assert settings["bos_token_id"] == 3


def test_the_configuration_names_the_type_of_the_weights(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(base)
    write_model(ModelFolder(base), adapter, tmp_path / "ours")
    assert read(tmp_path / "ours" / "config.json")["dtype"] == "float16"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.dtype is torch.float16


def test_the_type_is_changed_wherever_it_is_named() -> None:
    given = {
        "torch_dtype": "float32",
        "text_config": {"dtype": "float32", "hidden_size": 8},
        "vision_config": {"torch_dtype": None},
        "auto_map": {"AutoModel": "modeling.Model"},
    }
    assert stored_config(given, torch.bfloat16, trusted=False) == {
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "hidden_size": 8},
        "vision_config": {"torch_dtype": None},
    }
    assert given["torch_dtype"] == "float32"
    assert "auto_map" in stored_config(given, torch.bfloat16, trusted=True)


@pytest.mark.parametrize("trusted", [True, False])
def test_the_models_own_code_goes_along_only_where_it_is_trusted(
    base: Path, adapter: Path, tmp_path: Path, trusted: bool
) -> None:
    (base / "modeling_tiny.py").write_text("")
    write(base / "config.json", auto_map={"AutoModel": "modeling_tiny.Tiny"})
    assemble(ModelFolder(base, trusted), adapter, tmp_path / "ours")
    assert (tmp_path / "ours" / "modeling_tiny.py").exists() is trusted
    assert ("auto_map" in read(tmp_path / "ours" / "config.json")) is trusted
