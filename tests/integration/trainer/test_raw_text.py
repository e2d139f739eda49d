"""Continued pretraining on plain text: what is learnt of it, and a run of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import DOCUMENT, Example, as_example
from finetune_trainer.export.gate.rows import choose_rows, prompts_of
from finetune_trainer.export.gguf.importance import chunks
from finetune_trainer.export.reference import Generated
from tests.integration.trainer.conftest import Trainer
from tests.integration.trainer.recipe import tokenized

TEXT = "the kettle hums and then it is hot so pour the water over the leaves and wait"
WORDS = TEXT.split()


def document(words: int, start: int = 0) -> Example:
    text = " ".join(WORDS[(start + n) % len(WORDS)] for n in range(words))
    return as_example([{"role": DOCUMENT, "content": text}])


def test_every_token_is_learnt_and_a_text_ends_with_the_end_token(
    tiny_model: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Without a chat template. A long text is several rows, which share a token each."""
    short, long = document(5), document(40)
    found = tokenized(tiny_model, tmp_path, [short, long], 16)
    rows = list(found.rows)
    ends = [tokenizer.eos_token_id]
    for example, of_text in ((short, rows[:1]), (long, rows[1:])):
        whole = tokenizer(example["completion"][0]["content"])["input_ids"] + ends
        joined = of_text[0]["input_ids"] + [t for row in of_text[1:] for t in row["input_ids"][1:]]
        assert joined == whole
        assert all(row["labels"] == row["input_ids"] for row in of_text)
    assert len(rows) == 1 + 3
    assert max(found.lengths) == 16
    assert found.learns_end
    assert int(found.targets.sum()) == int((found.lengths - 1).sum())


def test_the_gate_measures_texts_and_has_them_continued(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    examples = [document(60, start) for start in range(6)]
    rows = choose_rows(tokenizer, examples)
    assert len(rows.measured) == 6
    assert all(row.measured[0] == 1 for row in rows.measured), "after the first token"
    assert [list(row.ids) for row in rows.measured] == [list(ids) for ids in rows.full_ids]
    for prompt, example in zip(prompts_of(tokenizer, rows.examples), examples, strict=True):
        text = example["completion"][0]["content"]
        begun = str(tokenizer.decode(list(prompt.ids)))
        shown = prompt.sample(None, Generated(text=" and on", tokens=2, stopped=True))
        assert begun == shown.prompt
        assert shown.prompt + str(shown.expected) == text
    assert sum(map(len, chunks(tokenizer, examples))) == sum(map(len, rows.full_ids))


def test_text_is_prepared_and_what_was_held_out_is_learnt(
    trainer: Trainer, run_config: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    """The base model has no chat template, and one text is longer than a row may be."""
    texts = [document(12 + n % 5, n)["completion"][0]["content"] for n in range(24)]
    texts[3] = document(90)["completion"][0]["content"]
    file = tmp_path / "texts.jsonl"
    file.write_text(
        "".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(texts))
    )
    model = without_template(tiny_model, tmp_path / "base")
    config = run_config | {
        "model": {"source": str(model)},
        "dataset": {"source": str(file), "evalFraction": 0.25},
        "training": {"learningRate": 0.005, "epochs": 1, "batchSize": 4, "maxSequenceLength": 32},
        "export": {"gguf": [], "merged": False},
        "output": {"uri": str(tmp_path / "out")},
    }
    prepared = trainer("prepare", config)
    assert prepared.result is not None, prepared.output
    assert prepared.code == 0, prepared.output
    assert "1 texts beyond the maximum length are split into 4 rows" in prepared.result.message
    assert prepared.result.resolved is not None
    config["resolved"] = prepared.result.resolved.model_dump(mode="json")

    trained = trainer("train", config)
    assert trained.result is not None, trained.output
    assert trained.code == 0, trained.output
    assert "eval.jsonl: the tokens that prepare left are used" in trained.output
    assert trained.result.metrics["evalLoss"] < trained.result.metrics["baseEvalLoss"]
    assert trained.result.metrics["perplexity"] < trained.result.metrics["basePerplexity"]


def without_template(model: Path, folder: Path) -> Path:
    """A base model that knows no chat."""
    folder.mkdir()
    for file in model.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).symlink_to(file)
    assert "chat_template" not in (folder / "tokenizer_config.json").read_text()
    return folder
