"""How report and card say that the artifacts are loaded."""

from __future__ import annotations

import pytest

from finetune_trainer.contract import Artifact, Quantization
from finetune_trainer.export.gguf.files import preferred
from finetune_trainer.export.report import Facts, render_report
from finetune_trainer.export.report.summary import (
    loading_commands,
    served_file,
)
from tests.report_facts import (
    artifacts,
    config,
    facts,
    gate,
    name,
    trained,
)


def titles(given: Facts) -> list[str]:
    return [way.title for way in loading_commands(given)]


def test_only_what_is_there_is_told_how_to_load() -> None:
    assert titles(facts()) == [
        "llama.cpp",
        "Ollama",
        "transformers",
        "vLLM, merged model",
        "PEFT adapter",
        "vLLM, adapter on its base model",
        "llama.cpp, adapter on its base model",
    ]
    adapter = [each for each in artifacts() if each.path.startswith("adapter/")]
    assert titles(facts(files=adapter)) == ["PEFT adapter", "vLLM, adapter on its base model"]
    dora = config(training={"lora": {"useDora": True}})
    assert titles(facts(files=adapter, config=dora)) == ["PEFT adapter"]


@pytest.mark.parametrize(
    ("parameters", "kind"), [(1.2e9, Quantization.Q8_0), (8e9, Quantization.Q4_K_M)]
)
def test_the_file_of_the_commands_is_the_modelfiles(parameters: float, kind: Quantization) -> None:
    given = facts(trained=trained(metrics={"baseParameters": parameters}))
    assert served_file(given) == f"gguf/{name(kind)}"
    kinds = [check.quantization for check in given.gate.files if check.passed]
    assert preferred(kinds, parameters) is kind


def test_a_refused_file_is_never_recommended() -> None:
    assert served_file(facts()) is not None
    refused = gate(files=gate().files[3:])
    assert served_file(facts(gate=refused)) is None
    # verify: warn leaves it where the good ones are.
    place = Artifact(path=f"gguf/{name(Quantization.Q3_K_M)}", bytes=1, sha256="0")
    assert served_file(facts(gate=refused, files=(place,))) is None


def test_a_base_model_of_a_bucket_is_named_by_its_folder() -> None:
    given = facts(config=config(job=None, model={"source": "s3://models/bases/tiny-llama"}))
    command = next(way.command for way in loading_commands(given) if way.title == "PEFT adapter")
    assert '"./tiny-llama"' in command
    assert given.name == "tiny-llama-tuned"
    assert "huggingface.co" not in render_report(given)


@pytest.mark.parametrize(
    ("rank", "argument"), [(1, 8), (16, 16), (17, 32), (512, 512), (513, None)]
)
def test_vllm_gets_a_rank_that_it_takes(rank: int, argument: int | None) -> None:
    given = facts(config=config(training={"lora": {"r": rank}}))
    commands = [
        way.command for way in loading_commands(given) if way.title.startswith("vLLM, adapter")
    ]
    wanted = [] if argument is None else [f"--max-lora-rank {argument} "]
    assert [part for command in commands for part in wanted if part in command] == wanted
    assert len(commands) == len(wanted)
