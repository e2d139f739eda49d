"""README.md: metadata that the Hub reads, and nothing that the public shouldn't."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from finetune_trainer.contract import GateReport
from finetune_trainer.export.report import license_of, plain, render_card, write_model_card
from tests.report_facts import (
    artifacts,
    config,
    dataset_report,
    facts,
    gate,
    lineage,
    name,
    trained,
)


def test_the_metadata_comes_back_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    write_model_card(file, facts())
    card = ModelCard.load(file)
    found = card.data.to_dict()
    results = found.pop("model-index")
    assert found == {
        "base_model": "meta-llama/Llama-3.2-1B-Instruct",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "license": "llama3.2",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "sft", "gguf", "conversational", "finetune-operator"],
    }
    assert results == [
        {
            "name": "support-bot",
            "results": [
                {
                    "task": {"type": "text-generation"},
                    "dataset": {"name": "held-out rows of tickets-2026.csv", "type": "csv"},
                    "metrics": [
                        {"type": "loss", "value": 1.845, "name": "Loss on held-out answers"},
                        {
                            "type": "perplexity",
                            "value": 6.3281,
                            "name": "Perplexity of held-out answers",
                        },
                    ],
                }
            ],
        }
    ]
    card.save(tmp_path / "again.md")
    assert ModelCard.load(tmp_path / "again.md").data.to_dict() == card.data.to_dict()


def test_what_is_not_known_is_left_out() -> None:
    given = facts(
        config=config(model={"source": "s3://models/tiny"}, training={"method": "qlora"}),
        trained=trained(metrics={}),
        gate=GateReport(),
        files=[each for each in artifacts() if each.path.startswith("adapter/")],
        license=None,
    )
    card = ModelCard(render_card(given))
    assert card.data.to_dict() == {  # type: ignore[no-untyped-call] # huggingface_hub
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "qlora", "sft", "conversational", "finetune-operator"],
    }
    assert "There were no held-out rows" in card.text
    assert "The license of the base model is not known here" in card.text


def test_the_text_says_what_it_is_and_what_was_not_measured() -> None:
    text = ModelCard(render_card(facts())).text
    for part in (
        "| Loss on held-out answers, nats per token | 3.201 | 1.845 |",
        "| Q4_K_M | passed | 0.0347 | 0.08 | 92.0% |",
        "| Rows that can't be used | 3 |",
        "| learningRate | 0.0003 |",
        "```sh\nollama create support-bot -f Modelfile",
        "vllm serve ./merged --served-model-name support-bot",
        "no general benchmark was run",
        "Noticed in training: Overfitting. step 60:",
    ):
        assert part in text, part
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        f"## {title}"
        for title in ("Results", "How to load it", "Data", "Training", "Files", "Limits")
    ]


def test_a_model_of_plain_text_is_no_chat() -> None:
    dataset = dataset_report()
    dataset["detected"] |= {"layout": "text", "columns": {"text": "text"}}
    card = ModelCard(render_card(facts(dataset=dataset)))
    assert "conversational" not in card.data.to_dict()["tags"]  # type: ignore[no-untyped-call] # huggingface_hub
    for part in ("| Loss on held-out texts", "-no-cnv -p", 'write("…"', "| Split at maxSeq"):
        assert part in card.text, part
    assert "-cnv\n" not in card.text.replace("-no-cnv", "")


def test_training_rows_in_place_of_held_out_ones_are_named() -> None:
    text = render_card(facts(trained=trained(metrics={}), gate=gate(held_out=False)))
    assert "of 32 training answers" in text
    assert "2,048 tokens of rows that were trained on" in text


@pytest.mark.parametrize(
    "secret",
    ["company-data", "company-models", "minio.internal", "descale the kettle", "citric acid"],
)
def test_no_bucket_no_address_and_no_row_is_in_it(secret: str) -> None:
    assert secret not in render_card(facts())
    base = "s3://company-models/bases/tiny"
    given = facts(config=config(model={"source": base}), lineage=lineage(model=base))
    assert secret not in render_card(given)


def test_text_of_others_makes_no_marks() -> None:
    assert plain("a | b\n# <b>*c*</b> `d`") == "a \\| b # \\<b\\>\\*c\\*\\</b\\> \\`d\\`"
    notice = {"code": "Overfitting", "evidence": "<script>\n# x", "remedy": "a|b"}
    given = facts(trained=trained(notices=[notice]), lineage=lineage(versions={}))
    text = render_card(given)
    assert "<script>" not in text
    assert "\n# x" not in text


def write(folder: Path, readme: str | None, settings: object) -> Path:
    if readme is not None:
        (folder / "README.md").write_text(readme)
    if settings is not None:
        (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("readme", "settings", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n# x", {"license": "mit"}, "apache-2.0"),
        ("# no metadata", {"license": "mit"}, "mit"),
        ("---\nlicense: [a, b]\n---\n", None, None),
        ("---\nlicense: {\n---\n", None, None),
        (None, ["mit"], None),
        (None, None, None),
    ],
)
def test_the_license_is_the_base_models_where_it_says_so(
    tmp_path: Path, readme: str | None, settings: object, expected: str | None
) -> None:
    assert license_of(write(tmp_path, readme, settings)) == expected


def test_without_a_folder_there_is_no_license() -> None:
    assert license_of(None) is None


def test_a_refused_file_is_listed_as_such() -> None:
    text = render_card(facts())
    assert "| Q3_K_M | refused |" in text
    assert f"`rejected/{name(gate().files[3].quantization)}`" in text


def test_it_names_its_version() -> None:
    given = facts()
    assert f"Version `{given.lineage.fingerprints.export[:12]}`." in render_card(given)


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("s3://models/faq/versions/0123456789ab/adapter/", "0123456789ab"),
        ("s3://models/faq/versions/0123456789ab", "0123456789ab"),
        ("org/faq-adapter", "org/faq-adapter"),
    ],
)
def test_an_adapter_that_the_training_went_on_from_is_named(source: str, named: str) -> None:
    text = render_card(facts(lineage=lineage(init_from=source)))
    assert f"The training went on from the adapter {plain(named)}." in text
    assert "s3://models/faq" not in text
