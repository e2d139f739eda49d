"""The Python that the report and the card tell people to run, run on real files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from finetune_trainer.export.report.summary import loading_commands
from tests.report_facts import artifacts, config, facts


@pytest.fixture
def export(tiny_model: Path, tmp_path: Path) -> Path:
    """An output folder with a merged model and an adapter, and the base model beside them."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("tiny", "merged"):
        shutil.copytree(tiny_model, tmp_path / name)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float16)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(
        str(tmp_path / "adapter"), save_embedding_layers=False
    )
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "adapter")
    return tmp_path


def test_the_commands_run(
    export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(export)
    given = facts(config=config(model={"source": "s3://models/tiny"}), files=artifacts())
    commands = {
        each.title: each.command for each in loading_commands(given) if each.language == "python"
    }
    assert list(commands) == ["transformers", "PEFT adapter"]

    exec(commands["transformers"].replace("256", "8"), {})  # noqa: S102 - it is what is tested
    assert capsys.readouterr().out.strip()

    loaded: dict[str, object] = {}
    exec(commands["PEFT adapter"], loaded)  # noqa: S102
    assert "lora_A" in str(loaded["model"])
    assert loaded["tokenizer"].chat_template  # type: ignore[attr-defined]
